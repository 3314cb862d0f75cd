"""A family that the package does not know trains, distils its guidance, is saved, loaded and merged."""

import pytest
import torch

from diverse_cfg.functional.divergence import DIVERGENCES
from diverse_cfg.merging import merge_checkpoints
from diverse_cfg.policies.loading import load_policy, load_processor
from diverse_cfg.policies.policy import as_policy
from diverse_cfg.rewards import DiversityReward
from diverse_cfg.trainer import CFGDiversityTrainer
from tests.toy import toy_folder
from tests.training import CodeEmbedder, tiny_args, tiny_trainer


class LetterEmbedder(CodeEmbedder):
    sampling_rate = 1


PROMPTS = ["red big", "green small", "blue round", "big blue"]


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """A base, a student without and one with the diversity reward; the divergence of their first and last steps."""
    root = tmp_path_factory.mktemp("toy")
    base, logs = toy_folder(root / "base"), {}
    for name, coefficient in (("quality", 0.0), ("diversity", 3.0)):
        settings = {"diversity_coef": coefficient, "clip_seconds": 10, "max_steps": 30, "guidance_scale": 3.0}
        trainer = CFGDiversityTrainer(
            base,
            DiversityReward(LetterEmbedder(num_codebooks=1, codes=12)) if coefficient else None,
            tiny_args(root / name, **settings),
            PROMPTS,
        )
        trainer.train()
        trainer.save_model()
        logs[name] = [entry for entry in trainer.state.log_history if "loss/distillation" in entry]
    return root, logs


def test_its_guidance_is_distilled(students):
    """The unguided student comes close to the guided base, on its own clips."""
    _, logs = students
    divergences = [entry["loss/distillation"] for entry in logs["quality"]]
    assert sum(divergences[-3:]) < 0.35 * sum(divergences[:3]), divergences
    rewards = [entry["rewards/diversity/mean"] for entry in logs["diversity"]]
    assert all(0 <= reward <= 2 for reward in rewards)


def test_what_is_saved_is_what_is_loaded_and_merged(students):
    """The average of two students has the mean of their weights, and samples without guidance."""
    root, _ = students
    merged = merge_checkpoints([root / "quality", root / "diversity"], 0.25, root / "merged")
    states = [load_policy(folder).state_dict() for folder in (root / "quality", root / "diversity", merged)]
    for name in states[0]:
        torch.testing.assert_close(states[2][name], 0.75 * states[0][name] + 0.25 * states[1][name])
    assert not torch.equal(states[0]["rnn.weight_hh_l0"], states[1]["rnn.weight_hh_l0"])
    assert torch.equal(states[0]["words.weight"], states[1]["words.weight"])
    policy = as_policy(load_policy(merged), load_processor(merged))
    assert policy.model.generation_config.guidance_scale == 1.0
    clips = policy.sample(policy.encode_text(["red big"]).repeat_interleave(3), 10)
    assert clips.codes.shape == (3, 1, 10)


def test_its_own_null_prompt_guides(tmp_path):
    """The teacher's other row is the family's null prompt, not zeros."""
    folder = toy_folder(tmp_path)
    policy = as_policy(load_policy(folder), load_processor(folder))
    condition, codes = policy.encode_text(PROMPTS[:2]), torch.arange(10).expand(2, 1, 10)
    torch.testing.assert_close(
        policy.hidden_states(codes, policy.null(condition)), policy.hidden_states(codes, None)
    )


def test_a_divergence_is_one_line_of_one_table(tmp_path, monkeypatch):
    """What CONTRIBUTING promises of a new divergence: the loss, the settings and the help read `DIVERGENCES`."""
    reverse_kl = DIVERGENCES["reverse_kl"]

    def half(*arguments):
        value, slope = reverse_kl(*arguments)
        return value / 2, slope / 2

    monkeypatch.setitem(DIVERGENCES, "half_reverse_kl", half)
    found = {}
    for name in ("reverse_kl", "half_reverse_kl"):
        trainer = tiny_trainer(tmp_path / name, divergence=name, diversity_coef=0.0, max_steps=1)
        trainer.train()
        found[name] = trainer.state.log_history[0]
    for metric in ("loss", "grad_norm"):
        assert found["half_reverse_kl"][metric] == pytest.approx(found["reverse_kl"][metric] / 2, rel=1e-3)


@pytest.mark.parametrize(("name", "other"), [("vocab_size", 13), ("delays", (1,))])
def test_a_teacher_with_other_codes_is_refused(tmp_path, monkeypatch, name, other):
    """Fault: a divergence between two policies whose codes do not mean the same."""
    folder = toy_folder(tmp_path / "base")
    student, teacher = (as_policy(load_policy(folder)) for _ in range(2))
    kind = type("Other", (type(teacher),), {name: property(lambda _: other)})
    monkeypatch.setattr(teacher, "__class__", kind)
    with pytest.raises(ValueError, match=rf"teacher_model has {name}=.*13|teacher_model has {name}=\(1,\)"):
        teacher.share_with(student)
