"""What an estimator of the diversity's gradient is worth, on gradients whose signal and noise are known."""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("nano_recipe")


def test_signal_and_noise_of_known_gradients():
    """Catches noise that is taken for signal: products of a batch with itself."""
    from estimators import REFERENCE, compare

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, 50, generator=generator)
    truth = torch.zeros(50)
    truth[0] = 0.5
    rows = compare(
        {
            REFERENCE: noise + truth,
            "half": 0.5 * (noise + truth),
            "none": torch.randn(400, 50, generator=generator),
        }
    )
    reference, half, none = rows
    # In Adam's metric every coordinate is divided by the root of its root mean square, which is about 1.
    assert reference["signal"] == pytest.approx(0.5, abs=3 * reference["signal_se"] + 0.03)
    assert reference["noise"] == pytest.approx(50**0.5, rel=0.05)
    assert half["signal_to_noise"] == pytest.approx(reference["signal_to_noise"])
    assert half["batches"] == pytest.approx(1 / reference["signal_to_noise"] ** 2)
    assert abs(none["signal"]) < 3 * none["signal_se"] < 0.5


def test_estimators_share_their_first_advantages():
    """Before the first prefix is complete, λ = 1 credits the whole outcome; the others' share is zero by hand."""
    from estimators import FRAMES, REFERENCE, estimators

    rewards = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    found = estimators(rewards, torch.zeros(2, 4, 5), torch.Size([8, 4, FRAMES]))
    assert torch.allclose(found["paper"], found[REFERENCE]), "a baseline of zero changes nothing"
    leading = found["paper, codebook 0"]
    assert torch.equal(leading[:, 0], found["paper"][:, 0]) and not leading[:, 1:].any()
    rest = found[f"{REFERENCE}, codebooks 1–3"]
    assert torch.allclose(rest + found[f"{REFERENCE}, codebook 0"], found[REFERENCE])
