"""Merging is exact: against NumPy float64, against PEFT, and to the bit where a parent must come back."""

import json
import warnings

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, GenerationConfig, MusicgenForConditionalGeneration, pipeline

from diverse_cfg.merging import (
    format_report,
    inspect_checkpoint,
    load_slider,
    merge_checkpoints,
    merge_sweep,
    parse_sweep,
    read_recipe,
    resolve_weights,
)
from diverse_cfg.policies.loading import is_distilled, load_policy
from diverse_cfg.provenance import Provenance, read_provenance, write_provenance
from diverse_cfg.publishing.plan import plan_upload
from tests import checkpoints as made


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return made.make_world(tmp_path_factory.mktemp("merging"))


@pytest.fixture(scope="module")
def deltas(world):
    return {
        "lora1": made.numpy_products(world["lora1"], made.lora1_scaling),
        "lora2": made.numpy_products(world["lora2"], made.lora2_scaling),
    }


def assert_close(folder, expected, atol=1e-6):
    found = made.numpy_weights(folder)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=atol, err_msg=name)


def assert_bit_equal(folder, state):
    """Equal once loaded in the type of `state`: only the codec may be stored more precisely."""
    found = load_file(folder / made.MODEL)
    assert found
    for name, tensor in found.items():
        assert torch.equal(tensor.to(state[name].dtype), state[name]), name
        assert tensor.dtype == state[name].dtype or name.startswith("audio_encoder."), name


# ---- the numbers


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
def test_full_models_are_interpolated(world, tmp_path, weight):
    """Catches swapped experts, a wrong weight, a tensor that is skipped."""
    first, second = made.numpy_weights(world["full1"]), made.numpy_weights(world["full2"])
    merged = merge_checkpoints([world["full1"], world["full2"]], weight, tmp_path / "merged")
    assert_close(merged, {name: (1 - weight) * first[name] + weight * second[name] for name in first})


@pytest.mark.parametrize("weights", [[0.7, 0.3], [-0.5, 1.5], [0.05, 0.95]])
def test_lora_products_are_interpolated(world, deltas, tmp_path, weights):
    """Catches mixing factors instead of products, a wrong alpha / r, and a layer that only one adapter
    has."""
    expected = made.numpy_weights(world["base"])
    untouched = set(expected) - set(deltas["lora1"]) - set(deltas["lora2"])
    for key, weight in zip(("lora1", "lora2"), weights, strict=True):
        for name, product in deltas[key].items():
            expected[name] = expected[name] + weight * product
    merged = merge_checkpoints([world["lora1"], world["lora2"]], weights, tmp_path / "m", extrapolate=True)
    assert_close(merged, expected)
    base, found = load_file(world["base"] / made.MODEL), load_file(merged / made.MODEL)
    assert untouched, "the adapters must leave something alone"
    assert all(torch.equal(found[name], base[name]) for name in untouched)


def test_logits_in_float64(world, deltas, tmp_path):
    """Catches float32 accumulation where float64 was asked for, and any layer wired to the wrong weight."""
    expected = MusicgenForConditionalGeneration.from_pretrained(world["base"], dtype=torch.float64)
    state = expected.state_dict()
    for key, weight in (("lora1", 0.6), ("lora2", 0.4)):
        for name, product in deltas[key].items():
            state[name] += weight * torch.from_numpy(product)
    merged = merge_checkpoints([world["lora1"], world["lora2"]], 0.4, tmp_path / "m", dtype="float64")
    model = MusicgenForConditionalGeneration.from_pretrained(merged, dtype=torch.float64)
    found, wanted = made.teacher_forced_logits(model), made.teacher_forced_logits(expected)
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("weight", "parent"), [(0.0, "lora1"), (1.0, "lora2")])
def test_an_end_of_the_line_is_pefts_merged_adapter(world, tmp_path, weight, parent, dtype):
    """Bit-equal: catches another order of rounding than PEFT's, and arithmetic on a weight of exactly 0 or
    1."""
    merged = merge_checkpoints([world["lora1"], world["lora2"]], weight, tmp_path / "m", dtype=dtype)
    expected = made.peft_merged(world["base"], world[parent], getattr(torch, dtype))
    assert_bit_equal(merged, expected.state_dict())


@pytest.mark.parametrize(("weight", "parent"), [(0, "full1"), (1, "full2")])
def test_an_end_of_the_line_is_the_full_parent(world, tmp_path, weight, parent):
    """Bit-equal: (1 − 0)·θ + 0·θ' is not, once θ' is infinite or the subtraction rounds."""
    merged = merge_checkpoints([world["full1"], world["full2"]], weight, tmp_path / "m")
    assert_bit_equal(merged, load_file(world[parent] / made.MODEL))


def test_three_ways_and_the_uniform_average(world, tmp_path):
    """Catches a two-expert formula, and weights that are not passed on."""
    parts = [made.numpy_weights(world[name]) for name in ("full1", "full2", "base")]
    three = [world["full1"], world["full2"], world["base"]]
    weighted = merge_checkpoints(three, [0.2, 0.3, 0.5], tmp_path / "weighted")
    assert_close(weighted, {n: 0.2 * parts[0][n] + 0.3 * parts[1][n] + 0.5 * parts[2][n] for n in parts[0]})
    uniform = merge_checkpoints(three, None, tmp_path / "uniform")
    assert_close(uniform, {n: sum(part[n] for part in parts) / 3 for n in parts[0]})


def test_merging_merges_is_merging_at_once(world, tmp_path):
    """Associativity: ⅓ of a with ⅔ of the middle of b and c is the uniform average; order does not matter."""
    a, b, c = world["full1"], world["full2"], world["base"]
    middle = merge_checkpoints([b, c], 0.5, tmp_path / "middle")
    nested = merge_checkpoints([a, middle], 2 / 3, tmp_path / "nested")
    at_once = merge_checkpoints([c, a, b], None, tmp_path / "at-once")
    assert_close(nested, made.numpy_weights(at_once))


def test_mixture_of_adapter_full_and_base(world, deltas, tmp_path):
    """An adapter stands for base + B·A beside a full model; catches a base that is counted twice or not at
    all."""
    base, full = made.numpy_weights(world["base"]), made.numpy_weights(world["full1"])
    sources, weights = [world["lora2"], world["full1"], world["base"]], [0.5, 0.3, 0.2]
    merged = merge_checkpoints(sources, weights, tmp_path / "m")
    expected = {n: 0.7 * base[n] + 0.3 * full[n] + 0.5 * deltas["lora2"].get(n, 0.0) for n in base}
    assert_close(merged, expected)


def test_task_arithmetic(world, deltas, tmp_path):
    """Weights that do not sum to 1 scale the differences from the base, never the base itself."""
    base = made.numpy_weights(world["base"])
    merged = merge_checkpoints([world["lora1"], world["lora2"]], [1, 1], tmp_path / "sum", unnormalized=True)
    total = {n: base[n] + deltas["lora1"].get(n, 0.0) + deltas["lora2"].get(n, 0.0) for n in base}
    assert_close(merged, total)
    full = made.numpy_weights(world["full1"])
    half = merge_checkpoints(
        [world["full1"]], [0.5], tmp_path / "half", unnormalized=True, base=world["base"]
    )
    assert_close(half, {n: (base[n] + full[n]) / 2 for n in base})
    with pytest.raises(ValueError, match=r"pass base="):
        merge_checkpoints([world["full1"]], [0.5], tmp_path / "no", unnormalized=True)


def test_replaced_modules_are_interpolated(world, tmp_path):
    """An adapter with `modules_to_save` and trained biases carries whole tensors beside its factors."""
    lora = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_heads.1"]}
    adapter = made.make_adapter(tmp_path / "adapter", world["base"], seed=3, **lora)
    merged = merge_checkpoints([world["base"], adapter], 0.25, tmp_path / "m")
    name = "decoder.lm_heads.1.weight"
    base = made.numpy_weights(world["base"])[name]
    saved = made.numpy_weights(adapter, "adapter_model.safetensors")[f"base_model.model.{name}"]
    assert np.abs(saved - base).max() > 0.1
    np.testing.assert_allclose(
        made.numpy_weights(merged)[name], 0.75 * base + 0.25 * saved, rtol=0, atol=1e-6
    )
    expected = made.peft_merged(world["base"], adapter, torch.float32)
    alone = merge_checkpoints([world["base"], adapter], 1.0, tmp_path / "alone")
    assert_bit_equal(alone, expected.state_dict())


# ---- adapter in, adapter out


def test_merged_adapter_equals_merged_model_and_pefts_cat(world, tmp_path):
    """Catches ranks that do not add up, scaling applied twice, and a layer that PEFT would adapt with
    nothing."""
    pair, weights = [world["lora1"], world["lora2"]], [1.3, -0.3]
    full = merge_checkpoints(pair, weights, tmp_path / "full", extrapolate=True)
    adapter = merge_checkpoints(pair, weights, tmp_path / "adapter", extrapolate=True, format="adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns about missing or unexpected keys
        played = made.peft_merged(world["base"], adapter, torch.float32)
    assert_close(
        full,
        {n: t.double().numpy() for n, t in played.state_dict().items() if n in load_file(full / made.MODEL)},
    )

    model = MusicgenForConditionalGeneration.from_pretrained(world["base"])
    model = PeftModel.from_pretrained(model, world["lora1"], adapter_name="one")
    model.load_adapter(world["lora2"], adapter_name="two")
    model.add_weighted_adapter(["one", "two"], weights, "both", combination_type="cat")
    model.set_adapter("both")
    cat = model.merge_and_unload().state_dict()
    for name, tensor in played.state_dict().items():
        torch.testing.assert_close(tensor, cat[name], rtol=0, atol=1e-6)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(world["base"])
    assert config["r"] == 6


@pytest.mark.parametrize(
    ("sources", "weights", "message"),
    [
        (["lora1", "full1"], [0.5, 0.5], "full model, which no adapter can hold"),
        (["lora1", "base"], [0.0, 1.0], "the merge is the base itself"),
    ],
)
def test_what_no_adapter_can_hold_is_refused(world, tmp_path, sources, weights, message):
    with pytest.raises(ValueError, match=message):
        merge_checkpoints([world[s] for s in sources], weights, tmp_path / "m", format="adapter")
    assert list(tmp_path.iterdir()) == []


def test_the_base_takes_its_share_of_an_adapter(world, deltas, tmp_path):
    """LERP of an adapter with the base is the adapter at half strength."""
    adapter = merge_checkpoints([world["base"], world["lora1"]], 0.5, tmp_path / "m", format="adapter")
    found = made.peft_merged(world["base"], adapter, torch.float32).state_dict()
    base = made.numpy_weights(world["base"])
    for name, product in deltas["lora1"].items():
        np.testing.assert_allclose(found[name].double().numpy(), base[name] + product / 2, rtol=0, atol=1e-6)


# ---- files in and out


def test_shards_old_names_and_aliases_are_read(world, tmp_path):
    """Checkpoints of other versions: several shards, weight_g/weight_v, the other name of the tied
    embedding, a saved position table. Catches a tensor that is silently taken from elsewhere or lost."""
    plain = made.copy(world["full1"], tmp_path / "plain")
    weights = load_file(plain / made.MODEL)
    renamed = {}
    for name, tensor in weights.items():
        name = name.replace("parametrizations.weight.original0", "weight_g")
        name = name.replace("parametrizations.weight.original1", "weight_v")
        renamed[name.replace("text_encoder.shared.", "text_encoder.encoder.embed_tokens.")] = tensor
    renamed["decoder.model.decoder.embed_positions.weights"] = torch.zeros(128, 16)
    assert renamed.keys() != weights.keys()
    (plain / made.MODEL).unlink()
    names = sorted(renamed)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: renamed[name] for name in part}, plain / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (plain / "model.safetensors.index.json").write_text(json.dumps(index))
    merged = merge_checkpoints([plain, world["full2"]], 0.0, tmp_path / "merged")
    assert_bit_equal(merged, weights)


def test_stored_types(world, tmp_path):
    """By default nothing trained is rounded away; the codec is never narrowed; the configuration says the
    type."""
    half = made.copy(world["base"], tmp_path / "half")
    save_file({n: t.half() for n, t in load_file(half / made.MODEL).items()}, half / made.MODEL)
    merged = merge_checkpoints([half, world["full1"]], 0.5, tmp_path / "widest")
    assert {t.dtype for t in load_file(merged / made.MODEL).values()} == {torch.float32}
    narrow = merge_checkpoints([world["full2"], world["full1"]], 0.5, tmp_path / "narrow", dtype="bfloat16")
    for name, tensor in load_file(narrow / made.MODEL).items():
        assert tensor.dtype == (torch.float32 if name.startswith("audio_encoder.") else torch.bfloat16), name
    assert MusicgenForConditionalGeneration.from_pretrained(narrow).decoder.dtype == torch.bfloat16


def test_accumulation_is_float32(world, tmp_path):
    """Catches a sum in the stored type: in bfloat16 the small third expert would vanish."""
    big, small = made.copy(world["base"], tmp_path / "big"), made.copy(world["base"], tmp_path / "small")
    name = "enc_to_dec_proj.bias"
    for folder, value in ((big, 1.0), (small, 2.0**-8)):
        weights = {n: t.bfloat16() for n, t in load_file(folder / made.MODEL).items()}
        weights[name] = torch.full_like(weights[name], value)
        save_file(weights, folder / made.MODEL)
    sources = [big, *[small] * 8]
    merged = merge_checkpoints(
        sources, [1.0] + [1.0] * 8, tmp_path / "m", unnormalized=True, base=big, dtype="float32"
    )
    # base + Σ (small − base) = 1 + 8 · (2⁻⁸ − 1)
    assert torch.all(load_file(merged / made.MODEL)[name] == 1 + 8 * (2.0**-8 - 1))


def test_the_merged_folder_plays_without_guidance(world, tmp_path):
    """Plain transformers: codes' special ids, no guidance, the length and sampling that the parents were
    trained with."""
    made.edit_json(
        made.copy(world["full1"], tmp_path / "hurt") / "config.json", pad_token_id=0
    )  # as TRL leaves it
    merged = merge_checkpoints([tmp_path / "hurt", world["full2"]], 0.5, tmp_path / "m")
    settings = GenerationConfig.from_pretrained(merged)
    assert settings.guidance_scale == 1.0
    assert (settings.pad_token_id, settings.bos_token_id, settings.decoder_start_token_id) == (16, 16, 16)
    assert (settings.max_new_tokens, settings.max_length) == (17 + 3, None)
    assert (settings.do_sample, settings.temperature, settings.top_k) == (True, 1.0, 0)
    model = MusicgenForConditionalGeneration.from_pretrained(merged)
    assert (
        model.config.pad_token_id
        == model.config.decoder.pad_token_id
        == model.config.decoder_start_token_id
        == 16
    )
    inputs = AutoProcessor.from_pretrained(merged)(text=["sad cello"], return_tensors="pt")
    assert model.generate(**inputs).shape == (1, 1, 17 * 64)


def test_pipeline_runs_one_row_per_clip(world, tmp_path, decoder_rows):
    """Catches a guidance scale that survives in the generation config: the decoder would run 2B rows."""
    merged = merge_checkpoints([world["full1"], world["full2"]], 0.5, tmp_path / "m")
    clips = pipeline("text-to-audio", model=str(merged))(["sad cello", "fast flute"], batch_size=2)
    assert len(clips) == 2
    assert set(decoder_rows) == {2}
    decoder_rows.clear()
    pipeline("text-to-audio", model=str(world["full1"]))(["sad cello", "fast flute"], batch_size=2)
    assert set(decoder_rows) == {4}, "the count itself must see guidance"


def test_the_recipe_is_recorded(world, tmp_path):
    """merge.yaml and diverse_cfg.json say how it was made, without absolute paths (they are published)."""
    merged = merge_checkpoints([world["lora1"], world["full2"]], 0.3, tmp_path / "m")
    recipe = read_recipe(merged)
    assert [(e["weight"], e["kind"]) for e in recipe["experts"]] == [(0.7, "adapter"), (0.3, "full")]
    assert recipe["dtype"] == "float32"
    provenance = read_provenance(merged)
    assert (provenance.kind, provenance.guidance_scale, provenance.base_model) == ("merge", 3.0, "user/base")
    parents = provenance.merge["experts"]
    assert [(p["name"], p["weight"], p["diversity_coef"]) for p in parents] == [
        ("lora1", 0.7, 0.0),
        ("full2", 0.3, 15.0),
    ]
    for file in ("merge.yaml", "diverse_cfg.json", "README.md", "config.json"):
        assert str(tmp_path.parent) not in (merged / file).read_text(), file
    again = merge_checkpoints([merged, world["full1"]], 0.5, tmp_path / "again")
    assert read_provenance(again).merge["experts"][0]["experts"] == parents


def test_one_adapter_becomes_the_student_that_it_is(world, tmp_path):
    """Folding an adapter into its base is no merge: the card must not call it one."""
    full = merge_checkpoints([world["lora2"]], None, tmp_path / "full")
    assert read_provenance(full).kind == "student"
    assert read_provenance(full).diversity_coef == 15.0
    assert_bit_equal(full, made.peft_merged(world["base"], world["lora2"], torch.float32).state_dict())


@pytest.mark.parametrize("format", ["full", "adapter"])
def test_adapters_of_somebody_else_stay_guided(world, tmp_path, format):
    """Fault: a merge of plain LoRAs is saved as a student, or played as one, by slider, card or upload."""
    pair = [made.copy(world[name], tmp_path / name) for name in ("lora1", "lora2")]
    for folder in pair:
        (folder / "diverse_cfg.json").unlink()
    with pytest.warns(UserWarning, match=r"none of the checkpoints .* their own guidance_scale=3"):
        merged = merge_checkpoints(pair, 0.3, tmp_path / "m", format=format)
    (pair[0] / "generation_config.json").write_text('{"guidance_scale": 2.0}')
    assert load_slider(None, pair).model.generation_config.guidance_scale == 2.0
    assert not load_slider(None, pair).model.is_distilled
    assert load_slider(None, [pair[0], world["lora2"]]).model.generation_config.guidance_scale == 1.0
    assert GenerationConfig.from_pretrained(merged).guidance_scale == 3.0
    assert not read_provenance(merged).distilled and not is_distilled(merged)
    assert load_policy(merged).generation_config.guidance_scale == 3.0
    text = (merged / "README.md").read_text()
    assert "It was not distilled" in text and "needs no guidance" not in text and "1.0`" not in text
    report = inspect_checkpoint(merged, base=world["base"])
    assert (report["generation_guidance_scale"], report["distilled"]) == (3.0, False)
    assert "TWICE" not in format_report(report)
    if format == "full":
        assert "It was not distilled" in plan_upload(merged, "me/m", license="mit").card
    report = inspect_checkpoint(pair[0])
    assert (report["kind"], report["generation_guidance_scale"]) == ("adapter", 2.0)
    assert "TWICE" not in format_report(report)


def test_parents_that_disagree_are_named(world, tmp_path):
    """Two students of different teachers have no common γ, and one set of sampling settings has to be
    chosen aloud."""
    other = made.copy(world["full2"], tmp_path / "other")
    write_provenance(other, Provenance("student", guidance_scale=5.0, sampling={"temperature": 0.9}))
    with pytest.warns(UserWarning, match="different sampling settings"):
        merged = merge_checkpoints([world["full1"], other], 0.5, tmp_path / "m")
    assert read_provenance(merged).guidance_scale is None


# ---- memory


def test_tensors_are_streamed(world, tmp_path, monkeypatch):
    """Catches a merge that collects the checkpoint: at no time may more than a few tensors be alive."""
    import weakref

    from diverse_cfg.policies import stored

    alive, peak = {}, 0
    read = stored.read_tensor

    def counting(info):
        nonlocal peak
        tensor = read(info)
        alive[id(tensor)] = tensor.nbytes
        weakref.finalize(tensor, alive.pop, id(tensor), None)
        peak = max(peak, sum(alive.values()))
        return tensor

    monkeypatch.setattr(stored, "read_tensor", counting)
    merge_checkpoints([world["full1"], world["full2"], world["lora1"]], None, tmp_path / "m")
    largest = max(t.nbytes for t in load_file(world["base"] / made.MODEL).values())
    assert 0 < peak <= 4 * largest


# ---- sweeps and weights


def test_sweep(world, tmp_path, monkeypatch):
    """Every point is the merge at that weight; a second run keeps what is complete and fills in what is
    missing."""
    pair = [world["lora1"], world["lora2"]]
    folders = merge_sweep(pair, parse_sweep("0:1:0.5"), tmp_path / "sweep")
    assert [folder.name for folder in folders] == ["weight-0", "weight-0.5", "weight-1"]
    single = merge_checkpoints(pair, 0.5, tmp_path / "single")
    assert (folders[1] / made.MODEL).read_bytes() == (single / made.MODEL).read_bytes()
    import shutil

    shutil.rmtree(folders[2])
    kept = (folders[0] / made.MODEL).stat().st_mtime_ns
    merge_sweep(pair, parse_sweep("0:1:0.5"), tmp_path / "sweep")
    assert folders[2].is_dir()
    assert (folders[0] / made.MODEL).stat().st_mtime_ns == kept
    with pytest.raises(FileExistsError, match="not made by this sweep"):
        merge_sweep(pair[::-1], parse_sweep("0:1:0.5"), tmp_path / "sweep")


@pytest.mark.parametrize("format", ["full", "adapter"])
@pytest.mark.parametrize("lost", ["weights", "end of the weights", "tokenizer", "provenance"])
def test_a_damaged_point_of_a_sweep_is_not_taken_as_done(world, tmp_path, format, lost):
    pair = [world["lora1"], world["lora2"]]
    [folder] = merge_sweep(pair, [0.5], tmp_path / "sweep", format=format)
    path = folder / (made.MODEL if format == "full" else "adapter_model.safetensors")
    path = {"tokenizer": folder / "tokenizer.json", "provenance": folder / "diverse_cfg.json"}.get(lost, path)
    content = path.read_bytes()
    path.unlink()
    if lost == "end of the weights":
        path.write_bytes(content[:-100])
    with pytest.raises(
        (ValueError, OSError), match=r"weight-0\.5 cannot be read .*: delete it and run the sweep"
    ):
        merge_sweep(pair, [0.5], tmp_path / "sweep", format=format)


@pytest.mark.parametrize("name", ["full1", "lora1"])
def test_a_sweep_does_not_go_on_with_other_weights(world, tmp_path, name):
    """Fault: an expert was trained again at the same path, and half of the sweep is another."""
    pair, output = [made.copy(world[name], tmp_path / "first"), world["lora2"]], tmp_path / "sweep"
    [folder] = merge_sweep(pair, [0.5], output)
    path = pair[0] / ("adapter_model.safetensors" if name == "lora1" else made.MODEL)
    weights = load_file(path)
    last = max(key for key in weights if "decoder.layers" in key and weights[key].ndim == 2)
    save_file(weights | {last: weights[last] + 1}, path, metadata={"format": "pt"})
    with pytest.raises(FileExistsError, match="merged from other weights than its checkpoints have now"):
        merge_sweep(pair, [0.5, 0.75], output)
    recipe = (folder / "merge.yaml").read_text()
    (folder / "merge.yaml").write_text(recipe.split("fingerprints:")[0])  # as older versions wrote it
    assert merge_sweep(pair, [0.5], output) == [folder]


def test_parse_sweep():
    assert parse_sweep("0:1:0.05")[::5] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert len(parse_sweep("0:1:0.05")) == 21, "both ends, whatever floating point does to 20 steps of 0.05"
    for text in ("0:1", "0:1:0", "1:0:0.1", "0:1:0.3", "0:nan:1", "a:b:c", "0:1:1e-9"):
        with pytest.raises(ValueError, match="sweep"):
            parse_sweep(text)


@pytest.mark.parametrize(
    ("weights", "count", "message"),
    [
        ([0.5, 0.6], 2, "sum to 1.1"),
        ([1.2, -0.2], 2, "leave \\[0, 1\\]"),
        (0.5, 3, "one weight per checkpoint"),
        ([0.5, 0.5], 3, "2 merge weights for 3"),
        ([float("nan"), 0.5], 2, "finite"),
        (float("inf"), 2, "finite"),
        (None, 0, "nothing to merge"),
    ],
)
def test_weights_that_were_not_asked_for(weights, count, message):
    with pytest.raises(ValueError, match=message):
        resolve_weights(weights, count)


def test_written_file_is_ordinary_safetensors(world, tmp_path):
    """The streaming writer's files are read by the library, with the metadata that transformers insists
    on."""
    merged = merge_checkpoints([world["full1"], world["full2"]], 0.5, tmp_path / "m", dtype="float16")
    with safe_open(merged / made.MODEL, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(load_file(world["full1"] / made.MODEL))


def test_the_commands_of_the_documentation(world, tmp_path, capsys):
    """`--weight`, `--uniform` and `-o` as users read them; `--sweep` prints one folder per line."""
    from diverse_cfg.cli import main

    pair = [str(world["lora1"]), str(world["lora2"])]
    assert main(["merge", *pair, "--weight", "0.25", "-o", str(tmp_path / "a")]) == 0
    assert [e["weight"] for e in read_recipe(tmp_path / "a")["experts"]] == [0.75, 0.25]
    assert main(["merge", *pair, str(world["full1"]), "--uniform", "-o", str(tmp_path / "b")]) == 0
    assert [e["weight"] for e in read_recipe(tmp_path / "b")["experts"]] == [1 / 3] * 3
    assert main(["merge", *pair, "--sweep", "0:1:1", "-o", str(tmp_path / "c")]) == 0
    assert capsys.readouterr().out.split()[-2:] == [str(tmp_path / "c" / f"weight-{w}") for w in (0, 1)]
