"""Systems: grids, merges, training seeds, and what a sweep's YAML must not say."""

import shutil

import pytest

from diverse_cfg.evaluation.systems import System, expand_systems, single
from diverse_cfg.provenance import Provenance, write_provenance


def test_grids_become_named_systems_of_one_series(tiny_folder):
    systems = expand_systems(
        [{"name": "base", "model": tiny_folder, "guidance_scale": [1.0, 3], "temperature": [0.9, 1.0]}]
    )
    assert [system.name for system in systems] == [
        "base γ=1 T=0.9",
        "base γ=1 T=1",
        "base γ=3 T=0.9",
        "base γ=3 T=1",
    ]
    assert {system.series for system in systems} == {"base"}
    assert [system.role for system in systems] == ["base", "base", "guided", "guided"]
    assert [(s.guidance_scale, s.temperature) for s in systems] == [(1, 0.9), (1, 1), (3, 0.9), (3, 1)]


def test_schedules_of_guidance_are_systems(tiny_folder):
    """Guidance in an interval beside constant guidance, each with its γ of every frame."""
    entry = {
        "name": "base",
        "model": tiny_folder,
        "guidance_scale": 3,
        "guidance_schedule": ["constant", "interval 0 0.5"],
    }
    constant, interval = expand_systems([entry])
    assert (constant.name, interval.name) == ("base γ(t)=constant", "base γ(t)=interval 0 0.5")
    assert constant.sampling_of(5).guidance_scale == 3
    assert interval.sampling_of(5).guidance_scale == (3, 3, 3, 1, 1)
    (adaptive,) = expand_systems([entry | {"guidance_schedule": "adaptive 0.1 5"}])
    assert adaptive.sampling_of(5).guidance_scale == 3
    assert adaptive.sampling_of(5).adaptive_guidance == (0.1, 5)
    with pytest.raises(ValueError, match="system 'base': guidance_schedule='adaptive 3 5' must name"):
        expand_systems([entry | {"guidance_schedule": "adaptive 3 5"}])
    with pytest.raises(ValueError, match="system 'base': guidance_schedule='ramp' must be"):
        expand_systems([entry | {"guidance_schedule": "ramp"}])
    for scale in (1, [1, 3]):
        with pytest.raises(
            ValueError, match=r"'base': guidance_schedule=interval 0 0\.5 has no effect at guid"
        ):
            expand_systems([entry | {"guidance_scale": scale}])


def test_a_model_that_begins_makes_another_system(tiny_folder, tmp_path):
    """A grid of how much it plays; what a base and its student make together is the student's, whoever begins."""
    student = shutil.copytree(tiny_folder, tmp_path / "runs" / "seed-4")
    write_provenance(student, Provenance(kind="student", guidance_scale=3.0))
    base, student = str(tiny_folder), str(student)
    entry = {"name": "h", "first": base, "first_frames": [5, 9], "first_guidance_scale": 3, "model": student}
    systems = expand_systems([entry])
    assert [(s.name, s.first, s.first_frames, s.first_guidance_scale) for s in systems] == [
        ("h n=5", base, 5, 3),
        ("h n=9", base, 9, 3),
    ]
    assert systems[0].first_sampling.guidance_scale == 3 and systems[0].sampling.guidance_scale == 1
    assert System.from_dict(systems[0].to_dict()) == systems[0]
    roles = {("base", 1): "base", ("base", 3): "guided", ("student", 1): "student", ("student", 3): "student"}
    for (first, scale), role in roles.items():
        one = entry | {"first": {"base": base, "student": student}[first], "first_guidance_scale": scale}
        (system,) = expand_systems([one | {"model": base, "first_frames": 5}])
        assert system.role == role and system.training_seeds == ((4,) if first == "student" else ())
    for wrong in ({"first_frames": 0}, {"first": ""}, {"first_guidance_scale": 0.5}):
        with pytest.raises(ValueError, match=r"system 'h': (a model that begins|guidance_scale=0.5 must)"):
            expand_systems([entry | {"first_frames": 5, "role": "base"} | wrong])


def test_lerp_gives_the_second_checkpoint_the_weight():
    """Catches λ and 1 − λ swapped: λ is the weight of the second checkpoint, the diverse one."""
    systems = expand_systems(
        [{"name": "LERP", "checkpoints": ["quality", "diverse"], "merge_weight": "0.25:0.75:0.5"}]
    )
    assert [system.merge_weight for system in systems] == [0.25, 0.75]
    assert systems[0].replicates == ((("quality", 0.75), ("diverse", 0.25)),)
    assert [system.name for system in systems] == ["LERP λ=0.25", "LERP λ=0.75"]
    assert systems[0].role == "merge"


def test_a_merge_without_weights_is_the_uniform_average():
    (system,) = expand_systems([{"name": "mean", "checkpoints": ["a", "b", "c", "d"]}])
    assert system.replicates == ((("a", 0.25), ("b", 0.25), ("c", 0.25), ("d", 0.25)),)
    assert system.merge_weight is None


def test_training_seeds_are_replicates_and_one_base_serves_them_all():
    (system,) = expand_systems(
        [{"name": "with base", "checkpoints": ["base", ["d0", "d1", "d2"]], "merge_weight": 0.5}]
    )
    assert system.replicates == tuple((("base", 0.5), (f"d{seed}", 0.5)) for seed in range(3))


def test_a_system_survives_its_file():
    system = System("x", ((("a", 0.5), ("b", 0.5)),), temperature=0.9, merge_weight=0.5, role="merge", step=3)
    assert System.from_dict(system.to_dict()) == system


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"model": "x"}, "needs a name"),
        ({"name": "a"}, "either a model or checkpoints"),
        ({"name": "a", "model": "x", "checkpoints": ["y"]}, "either a model or checkpoints"),
        ({"name": "a", "model": "x", "guidance": 3}, "no setting guidance"),
        ({"name": "a", "model": "x", "merge_weight": 0.5}, "needs checkpoints"),
        ({"name": "a", "checkpoints": ["x", "y"], "merge_weight": 1.5}, "leave \\[0, 1\\]"),
        ({"name": "a", "checkpoints": ["x", "y"], "weights": [0.5]}, "1 merge weights for 2"),
        ({"name": "a", "checkpoints": [["x", "y"], ["z", "z", "z"]], "weights": None}, "2 training seeds"),
        ({"name": "a", "checkpoints": "x"}, "must be a list"),
        ({"name": "a", "model": "x", "guidance_scale": 0.5, "role": "base"}, "guidance_scale=0.5"),
        ({"name": "a", "model": "x", "temperature": -1, "role": "base"}, "temperature=-1"),
        ({"name": "a", "model": "x", "role": "hero"}, "role='hero'"),
        ({"name": 5, "model": "x"}, "name=5 must be text"),
        ({"name": "a", "model": None}, "'a': model=None must be text or a list"),
        ({"name": "a", "model": []}, r"'a': model=\[\] is empty"),
        ({"name": "a", "model": "x", "guidance_scale": []}, r"guidance_scale=\[\] is empty"),
        (
            {"name": "a", "model": "x", "guidance_scale": "3"},
            "'a': guidance_scale='3' must be a finite number",
        ),
        ({"name": "a", "model": "x", "temperature": [1, True]}, "temperature=.* must be a finite number or"),
        ({"name": "a", "model": "x", "top_k": 1.5}, "top_k=1.5 must be an integer"),
        ({"name": "a", "model": "x", "series": ["s"]}, "series=.* must be text"),
        ({"name": "a", "model": "x", "step": "x"}, "step='x' must be an integer"),
        ({"name": "a", "checkpoints": ["x", 3]}, "checkpoints=.* must be a list"),
        (
            {"name": "a", "model": "x", "temperature": [0, 1], "top_k": 50},
            "top_k has no effect at temperature 0",
        ),
        (
            {"name": "a", "checkpoints": ["x", "y"], "merge_weight": 0.5, "weights": [0.2, 0.8]},
            "merge_weight and weights both say how to merge",
        ),
    ],
)
def test_wrong_entries_are_named(entry, message):
    with pytest.raises(ValueError, match=message):
        expand_systems([entry])


def test_names_are_unique():
    """Two rows of one name could not be told apart in the table, and their cells would overwrite each
    other."""
    entry = {"name": "a", "model": "x", "role": "base"}
    with pytest.raises(ValueError, match="twice: a"):
        expand_systems([entry, entry])
    with pytest.raises(ValueError, match="non-empty list"):
        expand_systems([])


def test_single():
    assert single("folder") == ((("folder", 1.0),),)


def test_training_seeds_are_read_from_folders():
    """Catches a seed read out of another name, of a merge of several, and of replicates that share one."""
    arm = [f"runs/arm/seed-{seed}/checkpoint-50" for seed in (3, 0)]
    for checkpoints, seeds in (
        (arm, (3, 0)),
        ([arm[0]], (3,)),
        (["runs/reseed-1/x", "seed-2"], ()),
        ([arm[0], "runs/other/seed-3"], ()),
    ):
        assert System("x", tuple(((path, 1.0),) for path in checkpoints)).training_seeds == seeds
    with_base = System("x", tuple(((path, 0.5), ("base", 0.5)) for path in arm))
    assert with_base.training_seeds == (3, 0)
    assert System("x", (((arm[0], 0.5), (arm[1], 0.5)),)).training_seeds == ()


def test_what_was_not_trained():
    """Catches a student that is sampled with guidance and passes for the base."""
    assert System("x", single("base"), role="base").untrained
    assert System("x", single("base"), role="guided", guidance_scale=3.0).untrained
    assert not System("x", single("runs/seed-0"), role="guided", guidance_scale=3.0).untrained
    assert not System("x", single("student")).untrained


def test_a_grid_of_guidance_that_is_told_and_merge_weights():
    entry = {"name": "both", "checkpoints": ["q", "d"], "merge_weight": [0, 1], "student_guidance": [1.5, 4]}
    systems = expand_systems([entry])
    assert [system.name for system in systems] == [
        f"both λ={weight} student γ={scale}" for weight in (0, 1) for scale in ("1.5", "4")
    ]
    assert [(s.merge_weight, s.student_guidance) for s in systems] == [(0, 1.5), (0, 4), (1, 1.5), (1, 4)]
    assert {system.series for system in systems} == {"both"}
    assert System.from_dict(systems[1].to_dict()) == systems[1]
    with pytest.raises(ValueError, match="student_guidance='high' must be"):
        expand_systems([{**entry, "student_guidance": "high"}])
