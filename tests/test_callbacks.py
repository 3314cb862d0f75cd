"""Callbacks on made-up runs."""

import math
from types import SimpleNamespace

import pytest
import soundfile
import torch

from diverse_cfg.callbacks import (
    AdaptiveClipCallback,
    AudioSamplesCallback,
    EvaluationClip,
    RewardHackingAlarm,
)

STATE = SimpleNamespace(global_step=7, is_world_process_zero=True)


def clip_run(norms, ratio=1.5, decay=0.5):
    limits, queue = [], list(norms)

    def clip(limit):
        limits.append(limit)
        return queue.pop(0)

    callback = AdaptiveClipCallback(ratio, clip, decay)
    for _ in norms:
        callback.on_pre_optimizer_step(None, STATE, None)
    return limits, callback


def test_clipping_follows_the_mean_and_ignores_outliers():
    """Fault: the outlier raises the limit that should have cut it; or the first step is cut at 0."""
    limits, callback = clip_run([2.0, 4.0, 100.0, 1.0])
    assert limits == [math.inf, 3.0, 3.75, pytest.approx(1.5 * 3.125)]
    assert callback.mean == pytest.approx((3.125 + 1.0) / 2)


def test_a_gradient_that_is_not_finite_stops_the_run():
    """Fault: NaN enters the weights, and every later checkpoint is broken."""
    with pytest.raises(FloatingPointError, match="nan at step 8"):
        clip_run([1.0, math.nan])


@pytest.mark.parametrize("channels", [1, 2])
def test_audio_of_an_evaluation_is_written(tmp_path, channels):
    """Fault: stereo written as thousands of channels, or samples beyond full scale wrapping around."""
    wave = torch.linspace(-2, 2, 100)
    wave = wave if channels == 1 else torch.stack([wave, -wave])
    clips = [EvaluationClip("A calm, piano song!", wave, 3200)]
    args = SimpleNamespace(output_dir=str(tmp_path), report_to=[])
    AudioSamplesCallback(lambda: clips).on_evaluate(args, STATE, None)
    audio, rate = soundfile.read(
        tmp_path / "audio" / "step-000007" / "00-a-calm-piano-song.wav", always_2d=True
    )
    assert rate == 3200 and audio.shape == (100, channels)
    assert audio[0, 0] == -1.0 and audio[-1, 0] == pytest.approx(1.0, abs=1e-3)
    assert [path.name for path in tmp_path.rglob("*") if path.name.startswith(".")] == []


BASE = {
    "eval_reward/diversity": 0.5,
    "eval_reward/monitor_diversity": 0.4,
    "eval_kl/clip": 40.0,
    "eval_rewards/adherence/mean": 0.8,
    "eval_rewards/adherence/std": 0.1,
    "eval_clips": 100.0,
}


def alarms(kl_limit=1.0, **changes):
    callback = RewardHackingAlarm(["adherence"], kl_limit=kl_limit)
    now = BASE | {f"eval_{key}": value for key, value in changes.items()}
    for metrics in (BASE, now):
        callback.on_evaluate(None, STATE, None, metrics=metrics)
    assert {step for step, _ in callback.raised} <= {STATE.global_step}
    return [message for _, message in callback.raised]


def test_a_healthy_run_raises_nothing():
    """Fault: alarms that always ring are switched off."""
    healthy = {"reward/diversity": 0.6, "reward/monitor_diversity": 0.45, "kl/clip": 20.0}
    assert alarms(**healthy, **{"rewards/adherence/mean": 0.79}) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward/diversity": 0.7, "reward/monitor_diversity": 0.41}, "reward hacking"),
        ({"rewards/adherence/mean": 0.77}, "quality: adherence fell from 0.800 to 0.770"),
        ({"kl/clip": 41.0}, "KL budget: 41.0"),
    ],
)
def test_each_alarm_rings_for_its_reason(changes, words):
    raised = alarms(**changes)
    assert len(raised) == 1 and words in raised[0]


def test_a_student_that_buys_diversity_has_a_budget():
    """Fault: an alarm at every evaluation of the usual path, which starts next to the teacher and leaves it."""
    assert alarms(kl_limit=4.0, **{"kl/clip": 150.0}) == []
    raised = alarms(kl_limit=4.0, **{"kl/clip": 170.0})
    assert len(raised) == 1 and "KL budget: 170.0" in raised[0] and "4 × the 40.0" in raised[0]


def test_teacher_hacking_needs_both_signs():
    """Fault: any fall of the divergence counted as suspicious."""
    raised = alarms(**{"kl/clip": 20.0, "rewards/adherence/mean": 0.7})
    assert [message.split(":")[0] for message in raised] == ["quality", "teacher hacking"]


def test_every_evaluation_set_is_compared_with_itself(caplog):
    """Fault: with a dict of sets, the harder one raises an alarm at the first evaluation."""
    callback = RewardHackingAlarm(["adherence"])
    hard = BASE | {"eval_kl/clip": 90.0, "eval_rewards/adherence/mean": 0.3}

    def named(name, metrics):
        values = metrics | {"eval_runtime": 1.0}
        return {key.replace("eval_", f"eval_{name}_", 1): value for key, value in values.items()}

    for step in range(2):
        later = {"eval_kl/clip": 95.0} if step else {}
        callback.on_evaluate(None, STATE, None, metrics=named("easy", BASE))
        callback.on_evaluate(None, STATE, None, metrics=named("hard", hard | later))
    assert [message.split(":")[0] for _, message in callback.raised] == ["KL budget"]
    assert f"alarm at step {STATE.global_step} on hard: KL budget: 95.0" in caplog.text


def test_metrics_that_are_missing_raise_nothing():
    """Fault: a run without second encoder or quality reward crashes at its first evaluation."""
    callback = RewardHackingAlarm([])
    callback.on_evaluate(None, STATE, None, metrics={"eval_loss": 1.0})
    callback.on_evaluate(None, STATE, None, metrics={"eval_loss": 2.0})
    assert callback.raised == []
