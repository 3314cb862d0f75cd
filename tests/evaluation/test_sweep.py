"""Sweeps: the same clips for everyone, what is kept, what is computed again, and what breaks without
breaking the rest."""

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from diverse_cfg.evaluation import features as features_module
from diverse_cfg.evaluation import generations as generations_module
from diverse_cfg.evaluation.features import JudgeFeature
from diverse_cfg.evaluation.generations import ClipSet, Player, describe
from diverse_cfg.evaluation.results import SystemResult, mean_estimate
from diverse_cfg.evaluation.sweep import _flag_incomparable
from diverse_cfg.evaluation.systems import System, expand_systems, single
from diverse_cfg.functional.guidance import guidance_schedule
from diverse_cfg.policies.loading import load_policy, load_processor
from diverse_cfg.policies.sampler.extension import hybrid_generate
from diverse_cfg.policies.sampler.rollout import RolloutWeights, fast_generate
from tests.evaluation.worlds import CountingJudge, broken_audio, encoder_folder, save_sibling, small_sweep
from tests.tiny import PROMPTS, save_tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models that differ."""
    root = tmp_path_factory.mktemp("models")
    return save_tiny(root / "a"), save_sibling(root / "b")


@pytest.fixture
def counted(monkeypatch):
    """How many batches were sampled, and how many clips decoded."""
    counts = {"sampled": 0, "decoded": 0}
    sample, decode = generations_module.fast_generate, Player.decode

    def counting_sample(*args, **kwargs):
        counts["sampled"] += 1
        return sample(*args, **kwargs)

    def counting_decode(self, codes):
        counts["decoded"] += len(codes)
        return decode(self, codes)

    monkeypatch.setattr(generations_module, "fast_generate", counting_sample)
    monkeypatch.setattr(Player, "decode", counting_decode)
    return counts


def models(*folders):
    """Systems "a", "b", … of these models."""
    return [System(name, single(folder)) for name, folder in zip("abc", folders, strict=False)]


def run(sweep, systems, **kwargs):
    return sweep.run(systems, progress=False, **kwargs)


def test_every_system_plays_the_same_prompts_with_the_same_noise(folders, tmp_path):
    """Catches noise keyed by the batch or by the system: clip g of prompt p has sample id p·G + g, always."""
    sweep = small_sweep(tmp_path)
    (system,) = expand_systems([{"name": "a", "model": folders[0], "guidance_scale": 2}])
    codes = sweep._replicate(system, system.replicates[0], None).codes[:, 0]
    direct = fast_generate(
        load_policy(folders[0]),
        PROMPTS,
        processor=load_processor(folders[0]),
        num_frames=12,
        guidance_scale=2.0,
        seed=0,
        num_generations=3,
        decode=False,
    ).codes
    np.testing.assert_array_equal(codes.reshape(12, 4, 12), direct.numpy())


def test_a_schedule_of_guidance_is_played_and_has_a_key_of_its_own(folders, tmp_path):
    """Faults: clips of the constant scale in the place of the schedule's, sampled or found in the cache."""
    entry = {
        "name": "a",
        "model": folders[0],
        "guidance_scale": 3,
        "guidance_schedule": ["constant", "linear"],
    }
    sweep = small_sweep(tmp_path)
    constant, linear = (
        sweep._replicate(system, system.replicates[0], None).codes[:, 0] for system in expand_systems([entry])
    )
    assert not np.array_equal(constant, linear)
    direct = fast_generate(
        load_policy(folders[0]),
        PROMPTS,
        processor=load_processor(folders[0]),
        num_frames=12,
        guidance_scale=guidance_schedule("linear", 3.0, 12),
        seed=0,
        num_generations=3,
        decode=False,
    ).codes
    np.testing.assert_array_equal(linear.reshape(12, 4, 12), direct.numpy())


def test_one_model_begins_and_another_goes_on(folders, tmp_path):
    """Faults: a first model that is left out, or of whose rows nobody knows; a key that forgets it."""
    entry = {"name": "a", "first": folders[0], "first_guidance_scale": 3, "model": folders[1]}
    sweep, systems = small_sweep(tmp_path), expand_systems([entry | {"first_frames": [4, 9]}])
    first, second = load_policy(folders[0]), load_policy(folders[1])
    for system in systems:
        replicate = sweep._replicate(system, system.replicates[0], None)
        direct = hybrid_generate(
            first,
            second,
            PROMPTS,
            processor=load_processor(folders[0]),
            num_frames=12,
            first_frames=system.first_frames,
            first_guidance_scale=3.0,
            seed=0,
            num_generations=3,
            decode=False,
        )
        np.testing.assert_array_equal(replicate.codes[:, 0].reshape(12, 4, 12), direct.codes.numpy())
        assert set(replicate.clips("timing", "decoder_rows").flat) == {2 * (system.first_frames + 3) + 15}
    plain = describe(models(folders[1])[0], systems[0].replicates[0], sweep.clips, 0)
    keys = [describe(system, system.replicates[0], sweep.clips, 0) for system in systems]
    assert keys[0] != keys[1] and "first" not in plain


def test_weights_are_fused_once_for_all_seeds(folders, tmp_path, monkeypatch):
    """Fault: a copy of the decoder for every seed. Another system must not play with this one's weights."""
    fuse, fused = RolloutWeights.from_model, []
    monkeypatch.setattr(RolloutWeights, "from_model", lambda *args: fused.append(args) or fuse(*args))
    sweep = small_sweep(tmp_path, seeds=(0, 1))
    systems = models(*folders)
    codes = [sweep._replicate(system, system.replicates[0], None).codes for system in systems]
    assert len(fused) == 2
    assert not np.array_equal(*codes)


def test_stock_generate_plays_the_same_clips_under_a_key_of_its_own(folders, tmp_path, monkeypatch, counted):
    """Faults: a backend that is not passed on; the fast one's seconds told as those of the other; a key that no
    longer finds what older versions have cached."""
    (system,) = expand_systems([{"name": "a", "model": folders[0], "guidance_scale": 2}])
    mixture = system.replicates[0]
    fast = small_sweep(tmp_path)
    expected = fast._replicate(system, mixture, None).codes
    stock = small_sweep(tmp_path, rollout_backend="transformers")
    monkeypatch.setattr(RolloutWeights, "from_model", None)
    np.testing.assert_array_equal(stock._replicate(system, mixture, None).codes, expected)
    assert counted["sampled"] == 2
    assert set(describe(system, mixture, stock.clips, 0)) - set(describe(system, mixture, fast.clips, 0)) == {
        "rollout_backend"
    }
    assert fast._settings([])["rollout_backend"] == "fast"


def test_batches_do_not_matter(folders, tmp_path, monkeypatch):
    (system,) = models(folders[0])
    whole = small_sweep(tmp_path / "whole")._replicate(system, system.replicates[0], None)
    monkeypatch.setattr(generations_module, "_BATCH", 4)
    monkeypatch.setattr(features_module, "_CHUNK", 5)
    parts = small_sweep(tmp_path / "parts")._replicate(system, system.replicates[0], None)
    np.testing.assert_array_equal(parts.codes, whole.codes)
    for encoder in ("reward", "heldout"):
        torch.testing.assert_close(parts.groups(encoder), whole.groups(encoder))
    assert set(parts.features["timing"]["batch"].flatten()) == {0, 1, 2, 3}
    assert set(whole.features["timing"]["batch"].flatten()) == {0}


def test_a_second_run_computes_nothing(folders, tmp_path, counted, monkeypatch):
    """Catches a cache that is written and never read; not even the model is loaded again."""
    systems = models(*folders)
    first = run(small_sweep(tmp_path), systems)
    assert counted == {"sampled": 2, "decoded": 24}
    monkeypatch.setattr(Player, "model", property(lambda self: pytest.fail("a model was loaded")))
    again = run(small_sweep(tmp_path), systems)
    assert counted == {"sampled": 2, "decoded": 24}
    assert again.to_dict() == first.to_dict()


def test_a_new_system_or_metric_computes_only_itself(folders, tmp_path, counted):
    run(small_sweep(tmp_path), models(folders[0]))
    run(small_sweep(tmp_path), models(*folders))
    assert counted == {"sampled": 2, "decoded": 24}
    judge = CountingJudge()
    judged = [JudgeFeature(judge, encoder_folder(tmp_path / "judge"))]
    found = run(small_sweep(tmp_path, features=judged), models(*folders))
    assert counted == {"sampled": 2, "decoded": 48}
    assert judge.calls == 2
    assert found["a"].metrics["adherence"].num_prompts == 4
    assert found["a"].metrics["adherence/key"].num_prompts == 1  # one prompt names it


@pytest.mark.parametrize("change", ["weights", "settings", "prompts", "seed", "encoder"])
def test_what_has_changed_is_computed_again(tmp_path, counted, change):
    """Catches a key that forgets what the clips depend on."""
    folder, settings, prompts, seeds = save_tiny(tmp_path / "model"), {}, PROMPTS, (0,)
    run(small_sweep(tmp_path), [System("a", single(folder))])
    before = dict(counted)
    if change == "weights":
        save_tiny(folder, seed=5)
    elif change == "settings":
        settings = {"temperature": 0.9}
    elif change == "prompts":
        prompts = [*PROMPTS[:-1], "slow drum song"]
    elif change == "seed":
        seeds = (1,)
    sweep = small_sweep(tmp_path, prompts=prompts, seeds=seeds)
    if change == "encoder":
        sweep.features[-1].fingerprint["content"] = "other"
    run(sweep, [System("a", single(folder), **settings)])
    assert (counted["sampled"] > before["sampled"]) == (change != "encoder")
    assert counted["decoded"] == before["decoded"] + 12


def test_an_interrupted_sweep_goes_on(folders, tmp_path, counted, monkeypatch):
    systems = models(*folders)
    compute = features_module.compute_features

    def interrupted(clips, *args):
        if clips.system.name == "b":
            raise KeyboardInterrupt
        return compute(clips, *args)

    with monkeypatch.context() as patch:
        patch.setattr("diverse_cfg.evaluation.sweep.compute_features", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(small_sweep(tmp_path), systems)
    assert counted == {"sampled": 2, "decoded": 12}
    found = run(small_sweep(tmp_path), systems)
    assert counted == {"sampled": 2, "decoded": 24}
    assert [row.ok for row in found.systems] == [True, True]


def test_a_system_that_fails_is_in_the_table_and_the_others_are_kept(folders, tmp_path, counted):
    """Catches one bad checkpoint that costs a night's sweep; after a repair only it is computed."""
    missing = tmp_path / "later"
    bad = {"name": "bad", "checkpoints": [folders[0], str(missing)], "merge_weight": 0.5}
    systems = [*expand_systems([bad]), *models(folders[0])]
    found = run(small_sweep(tmp_path), systems, compare_to=["bad", "a"])
    assert "no folder" in found["bad"].error
    assert found["a"].ok
    assert "failed: FileNotFoundError" in found.table(["diversity_heldout"])
    found.save(tmp_path / "results")
    save_sibling(missing)
    sampled = counted["sampled"]
    assert run(small_sweep(tmp_path), systems)["bad"].ok
    assert counted["sampled"] == sampled + 1


def test_a_full_disk_ends_the_sweep(folders, tmp_path, monkeypatch, counted):
    """Catches a night of sampling that nothing can be kept of."""

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("diverse_cfg.evaluation.cache.save_file", full)
    with pytest.raises(OSError, match=r"safetensors cannot be written: there is no space left"):
        run(small_sweep(tmp_path), [System(name, single(folders[0])) for name in "ab"])
    assert counted["sampled"] == 1


def test_broken_weights_are_a_failure_not_a_number(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_tiny(tmp_path / "nan")
    weights = load_file(f"{folder}/model.safetensors")
    weights["decoder.lm_heads.0.weight"][:] = torch.nan
    save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
    found = run(small_sweep(tmp_path), [System("nan", single(folder)), System("a", single(folders[0]))])
    assert "FloatingPointError" in found["nan"].error
    assert found["a"].ok


def test_a_merge_is_what_merge_checkpoints_writes(folders, tmp_path):
    """λ = 1 is the second checkpoint, to the bit; the half is neither."""
    lerp = expand_systems([{"name": "LERP", "checkpoints": list(folders), "merge_weight": [0.5, 1.0]}])
    found = run(small_sweep(tmp_path), [System("b", single(folders[1])), *lerp])
    assert all(row.ok for row in found.systems)
    for metric, cells in found["b"].cells.items():
        if metric != "seconds":
            np.testing.assert_array_equal(found["LERP λ=1"].cells[metric], cells)
    assert found["LERP λ=0.5"].metrics["diversity_reward"] != found["b"].metrics["diversity_reward"]


def test_sampling_seeds_are_groups_of_their_own(folders, tmp_path):
    """Catches seeds that are pooled into one group (pairs across seeds), or counted as prompts."""
    system = System("a", single(folders[0]))
    both = run(small_sweep(tmp_path, seeds=(0, 1)), [system])["a"]
    apart = [run(small_sweep(tmp_path, seeds=(seed,)), [system])["a"] for seed in (0, 1)]
    np.testing.assert_allclose(
        both.cells["diversity_reward"], np.mean([row.cells["diversity_reward"] for row in apart], axis=0)
    )
    assert both.metrics["diversity_reward"].num_prompts == 4


def test_training_seeds_are_replicates(folders, tmp_path):
    (system,) = expand_systems([{"name": "arm", "model": list(folders)}])
    found = run(small_sweep(tmp_path), [system])["arm"]
    alone = [run(small_sweep(tmp_path), [System("x", single(folder))])["x"] for folder in folders]
    np.testing.assert_array_equal(
        found.cells["diversity_heldout"], np.hstack([row.cells["diversity_heldout"] for row in alone])
    )


@pytest.mark.parametrize("kind", ["silence", "noise", "brown", "clipping", "offset", "hum"])
def test_broken_audio_ranks_last_and_does_not_win_unnoticed(folders, tmp_path, monkeypatch, kind):
    """Catches a front that a system wins by noise: its clips are all different, and nobody wants them."""
    decode = Player.decode

    def play(self, codes):
        if self.mixture[0][0] == folders[1]:
            return broken_audio(kind, len(codes), codes.shape[-1] * 64, seed=int(codes.sum()))
        time = torch.arange(codes.shape[-1] * 64) / 3200
        tones = 200 * (1 + codes[:, 0, :1] / 16)
        return 0.2 * torch.sin(2 * torch.pi * tones * time) + 0.02 * decode(self, codes).tanh()

    monkeypatch.setattr(Player, "decode", play)
    systems = [System("sound", single(folders[0])), System("broken", single(folders[1]))]
    found = run(small_sweep(tmp_path), systems)
    validity = {row.system.name: row.metrics["validity"].estimate for row in found.systems}
    assert validity["broken"] == 0 and validity["sound"] > 0.9
    assert not found["sound"].flags
    assert any("0% of the clips are valid" in flag for flag in found["broken"].flags)
    assert "broken ⚠" in found.table(["diversity_heldout"])
    if kind == "silence":
        assert found["broken"].metrics["diversity_heldout"].estimate == 0
        assert any("no heldout embedding" in flag for flag in found["broken"].flags)
    volume = found.hypervolume(["sound", "broken"], "diversity_heldout", "validity", (0, -1))
    assert volume.estimate == found.hypervolume(["sound"], "diversity_heldout", "validity", (0, -1)).estimate


class PitchJudge(CountingJudge):
    """ "Right" below 600 Hz."""

    def adherence(self, waveforms, sampling_rate, prompts):
        peak = torch.fft.rfft(waveforms).abs().argmax(dim=1) * sampling_rate / waveforms.shape[1]
        right = (peak < 600).double().numpy()
        return dict.fromkeys(("instrument", "tempo", "register", "key", "mean"), right)


def test_random_codes_rank_last_and_do_not_win_unnoticed(folders, tmp_path, monkeypatch):
    """Catches a front that random codes win: as audio they are sound, as diverse as can be, and nobody's music."""

    def play(self, codes):
        broken = self.mixture[0][0] == folders[1]
        pitch = (800 if broken else 200) * (1 + codes[:, 0, :1] / (16 if broken else 64))
        return 0.2 * torch.sin(2 * torch.pi * pitch * torch.arange(codes.shape[-1] * 64) / 3200)

    monkeypatch.setattr(Player, "decode", play)
    sweep = small_sweep(tmp_path, features=[JudgeFeature(PitchJudge(), encoder_folder(tmp_path / "judge"))])
    systems = [System("base", single(folders[0]), role="base"), System("random", single(folders[1]))]
    found = run(sweep, systems)
    assert found["random"].metrics["validity"].estimate == 1
    random, base = (found[name].metrics["diversity_heldout"].estimate for name in ("random", "base"))
    assert random > base
    assert not found["base"].flags
    assert any("prompt adherence is 0.000, against 1.000 of base" in flag for flag in found["random"].flags)
    volume = found.hypervolume(["base", "random"], "diversity_heldout", "validity", (0, -1))
    assert volume.estimate == found.hypervolume(["base"], "diversity_heldout", "validity", (0, -1)).estimate


def of_metric(name, metric, mean, spread=0.0, **kwargs):
    """A row with cells of one metric around a mean, of 16 prompts."""
    cells = mean + spread * np.linspace(-1, 1, 16)[:, None]
    return SystemResult(
        System(name, single("x"), **kwargs), metrics={metric: mean_estimate(cells)}, cells={metric: cells}
    )


@pytest.mark.parametrize(
    ("metric", "base", "mean", "spread", "flagged"),
    [
        ("kl_teacher", 47, 3000, 100, True),
        ("kl_teacher", 47, 600, 2000, False),  # above, but not clearly
        ("kl_teacher", 47, 300, 1, False),  # γ = 10 against a teacher of 3
        ("kl_teacher", 0.001, 3, 0, False),  # the base is the teacher
        ("adherence", 0.72, 0.3, 0.1, True),
        ("adherence", 0.72, 0.692, 0, False),  # T = 1.1
        ("rules", 0.6, 0.2, 0.1, True),
        ("text", 0.3, 0.05, 0.01, True),
        ("text", -0.1, -0.2, 0.0, False),  # no scale
        ("diversity_heldout", 0.3, 0.9, 0, False),
    ],
)
def test_only_what_is_clearly_broken_is_flagged(metric, base, mean, spread, flagged):
    """Catches a flag on systems that are merely worse, and one that is missing; sampling a student counts too."""
    rows = [
        of_metric("hot", metric, mean, spread, temperature=2.0, role="base"),
        of_metric("base", metric, base, role="base"),
    ]
    _flag_incomparable(rows)
    assert bool(rows[0].flags) == flagged
    assert not rows[1].flags


def test_nothing_is_flagged_without_a_base_to_compare_with():
    """Catches the guided or the hot base as the scale, and a system flagged for a metric that it lacks."""
    for other in (
        of_metric("guided", "adherence", 0.9, role="guided", guidance_scale=3.0),
        of_metric("hot", "adherence", 0.9, role="base", temperature=1.1),
        of_metric("base", "kl_teacher", 40, role="base"),
    ):
        rows = [other, of_metric("student", "adherence", 0.1)]
        _flag_incomparable(rows)
        assert not rows[1].flags


def test_a_set_metric_without_clips_is_empty_and_the_row_stands(folders, tmp_path, monkeypatch):
    """Catches a row that fails because one distance cannot be computed."""

    def play(self, codes):
        clips = broken_audio("silence", len(codes), codes.shape[-1] * 64)
        clips[0] = torch.sin(torch.arange(clips.shape[1]))
        return clips

    monkeypatch.setattr(Player, "decode", play)
    reference = np.random.default_rng(0).random((20, 16))
    row = run(small_sweep(tmp_path, reference=reference), [System("mute", single(folders[0]))])["mute"]
    assert row.ok and row.metrics["diversity_heldout"].estimate is not None
    assert row.metrics["frechet"].estimate is None
    assert any("frechet could not be computed" in flag for flag in row.flags)


def test_one_prompt_and_one_generation(folders, tmp_path):
    """Numbers without intervals, no diversity, and no crash."""
    found = run(
        small_sweep(tmp_path, prompts=PROMPTS[:1], num_generations=1), [System("a", single(folders[0]))]
    )
    row = found["a"]
    assert row.ok
    assert "diversity_heldout" not in row.metrics and "different_prompts_heldout" not in row.metrics
    assert row.metrics["validity"].low is None
    with pytest.raises(ValueError, match="num_generations >= 2"):
        small_sweep(tmp_path, num_generations=1, metrics=["diversity_heldout"])


@pytest.mark.parametrize("seeds", [(), (1, 1)])
def test_wrong_seeds_are_refused(seeds):
    with pytest.raises(ValueError, match="seeds must be different"):
        ClipSet(("a",), 2, 3, seeds)
