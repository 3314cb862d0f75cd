"""The expectation of the trainer's gradient, over every group of clips there is, against the exact one."""

import copy

import pytest
import torch

from diverse_cfg.config import CFGDiversityConfig
from diverse_cfg.rewards import DiversityReward
from diverse_cfg.trainer import CFGDiversityTrainer, advantages
from tests import enumeration
from tests.tiny import tiny_musicgen, tiny_processor

BETA = 1.7


def build(tmp_path, num_frames, num_generations, **settings):
    """A trainer in float64 over a policy whose clips can be listed; the student has left its teacher."""
    model = tiny_musicgen(
        seed=1,
        vocab_size=enumeration.CODES,
        num_codebooks=enumeration.CODEBOOKS,
        num_hidden_layers=1,
        hidden_size=8,
    ).double()
    with torch.no_grad():
        for head in model.decoder.lm_heads:
            head.weight *= 0.3  # no clip so rare that a mistake in it would not show
    teacher = copy.deepcopy(model)
    args = CFGDiversityConfig(
        output_dir=str(tmp_path),
        num_generations=num_generations,
        per_device_train_batch_size=num_generations,
        clip_seconds=num_frames / 50,
        bf16=False,
        report_to="none",
        **{"diversity_coef": BETA, **settings},
    )
    trainer = CFGDiversityTrainer(
        model,
        DiversityReward(enumeration.TableEmbedder()),
        args,
        train_dataset=[enumeration.PROMPT],
        processing_class=tiny_processor(),
    )
    with torch.no_grad():
        generator = torch.Generator().manual_seed(2)
        for parameter in model.decoder.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return trainer, model, teacher


def expected_gradient(trainer, num_frames, probability):
    """Σ over all groups of their probability times the gradient that the trainer's own path gives."""
    sequences = enumeration.all_sequences(num_frames)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    trainer.model.train()
    total = 0
    for group, weight in enumeration.groups(probability, trainer.num_generations):
        trainer._sample = lambda *_, rows=group, **__: sequences[rows]
        batch = trainer._generate_and_score_completions([{"prompt": enumeration.PROMPT}] * len(group))
        loss = trainer._compute_loss(trainer.model, batch)
        total = total + weight * enumeration.gradient(loss, parameters)
    return total


def relative_error(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def compare(tmp_path, num_frames, num_generations, wanted=None, **settings):
    trainer, model, teacher = build(tmp_path, num_frames, num_generations, **settings)
    exact = enumeration.exact(model, teacher, tiny_processor().tokenizer, num_frames)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    assert exact["probability"].sum().item() == pytest.approx(1)
    assert exact["probability"].min() > 1e-3
    objective = wanted(exact) if wanted else exact["Q"] + BETA * exact["D"]
    # The loss is minus the objective, both terms divided by the K·T codes of a clip.
    target = -enumeration.gradient(objective, parameters) / (enumeration.CODEBOOKS * num_frames)
    return relative_error(expected_gradient(trainer, num_frames, exact["probability"].detach()), target)


@pytest.mark.parametrize("num_generations", [3, 4, 8])
def test_expected_gradient_is_that_of_the_objective(tmp_path, num_generations):
    """Fault: an estimator whose bias depends on G, e.g. the ordinary leave-one-out baseline."""
    assert compare(tmp_path, 1, num_generations) < 1e-6


@pytest.mark.slow
def test_expected_gradient_on_longer_clips(tmp_path):
    """Fault: codes credited with the wrong frame or codebook; invisible when a clip has one frame."""
    assert compare(tmp_path, 2, 3) < 1e-6


def test_distillation_alone(tmp_path):
    """Fault: a divergence in the wrong direction, summed wrongly, or to an unguided teacher."""
    assert compare(tmp_path, 1, 3, lambda exact: exact["Q"], diversity_coef=0.0) < 1e-6


def test_diversity_alone(tmp_path):
    """Fault: a policy gradient that only looks right beside a larger term."""
    assert compare(tmp_path, 1, 3, lambda exact: BETA * exact["D"], distillation_coef=0.0) < 1e-6


def test_diversity_of_the_first_codebook(tmp_path):
    """Fault: the wrong codebook is left out, or its distillation with it."""
    found = compare(
        tmp_path, 1, 3, lambda exact: exact["Q"] + BETA * exact["D_leading"], diversity_codebooks=1
    )
    assert found < 1e-6 < 1e-2 < compare(tmp_path, 1, 3, diversity_codebooks=1)


@pytest.mark.slow
def test_sequence_score_adds_the_gradient_through_the_sampling(tmp_path):
    """Fault: a return that counts the code's own step, or the other sign; then Q in full is not reached."""
    whole = compare(tmp_path, 2, 3, lambda exact: exact["Q_full"] + BETA * exact["D"], sequence_score=True)
    stopped = compare(tmp_path, 2, 3, lambda exact: exact["Q_full"] + BETA * exact["D"])
    assert whole < 1e-6 < 1e-2 < stopped


def _plain_leave_one_out(rewards):
    others = (rewards.sum(dim=1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return 2 * (rewards - others)


MISTAKES = {
    "sign": lambda rewards, right: -right(rewards),
    "baseline": lambda rewards, right: _plain_leave_one_out(rewards),
    "scale": lambda rewards, right: right(rewards) / 2,
    "normalised": lambda rewards, right: (
        right(rewards) / right(rewards).std(dim=1, keepdim=True).clamp(min=1e-4)
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_deliberate_mistakes_are_seen(tmp_path, monkeypatch, mistake):
    """The other side: these tests would be worth nothing if a wrong estimator passed them."""
    right = advantages.diversity_advantages
    monkeypatch.setattr(
        advantages, "diversity_advantages", lambda rewards: MISTAKES[mistake](rewards.double(), right)
    )
    assert compare(tmp_path, 1, 4, lambda exact: BETA * exact["D"], distillation_coef=0.0) > 0.05


@pytest.fixture
def fitted_baseline(monkeypatch):
    """A prefix regression learned "on earlier batches", which stays as it is."""
    statistics = advantages.RidgeStatistics(torch.eye(1).double(), torch.tensor([0.8]).double())
    monkeypatch.setattr(advantages, "update_ridge", lambda old, new: statistics)
    create = advantages.PrefixBaseline.__init__

    def create_fitted(self, *args):
        create(self, *args)
        self.statistics = statistics

    monkeypatch.setattr(advantages.PrefixBaseline, "__init__", create_fitted)


@pytest.mark.slow
def test_prefix_baseline_is_unbiased(tmp_path, fitted_baseline):
    """Fault: a baseline that sees clips or codes that depend on the code it corrects."""
    assert compare(tmp_path, 2, 3, prefix_baseline=True) < 1e-6


@pytest.mark.slow
def test_prefix_baseline_on_earlier_codes_is_found_out(tmp_path, monkeypatch, fitted_baseline):
    """The other side: a baseline that has seen the code that it corrects biases the gradient."""
    monkeypatch.setattr(
        advantages,
        "code_segments",
        lambda frames, num_frames, delays: torch.ones(len(delays), num_frames).long(),
    )
    assert compare(tmp_path, 2, 3, prefix_baseline=True) > 1e-2
