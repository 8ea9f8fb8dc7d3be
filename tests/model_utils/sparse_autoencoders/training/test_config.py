"""Settings of a training run: what is refused, what follows from them, and the learning rate's way."""

import dataclasses
import json
import math
from typing import Any

import pytest

from auto_circuit.errors import AutoCircuitError, InputError, UnknownNameError
from auto_circuit.model_utils.sparse_autoencoders.training.config import (
    ARCHITECTURE_NAMES,
    BIASES,
    LOSSES,
    PENALTIES,
    TrainingConfig,
)

COUNTS = "n_tokens expansion batch_size tokens_per_pass buffer_tokens".split()
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("architecture", ARCHITECTURE_NAMES),
        ("loss", LOSSES),
        ("penalty", PENALTIES),
        ("bias", BIASES),
    ],
)
def test_names(name: str, valid: tuple[str, ...]) -> None:
    for value in valid:
        assert getattr(TrainingConfig(**{name: value}), name) == value
    for value in ("batchtop", "", None, 3, ["topk"]):
        with pytest.raises(UnknownNameError, match=f"No {name} of a training run") as found:
            TrainingConfig(**{name: value})
        assert any(good in str(found.value) for good in valid)


WRONG: list[tuple[str, tuple[Any, ...], str]] = [
    *((name, (0, -1, 1.5, 2.0, True, "3", NAN, [1]), "a whole number of at least 1") for name in COUNTS),
    ("n_tokens", (None, 2e6), "a whole number of at least 1"),
    ("batch_size", (None,), "a whole number of at least 1"),
    ("n_latents", (0, -5, 1.5, True, "3"), "a whole number of at least 1, or None"),
    ("aux_latents", (0, 2.0, False, "3"), "a whole number of at least 1, or None"),
    ("context_length", (1, 0, -1, 8.0, True), "a whole number of at least 2, or None"),
    ("l0", (0.0, -1.0, NAN, INF, None, "3", True, 10**400), "a number above 0"),
    *(
        (name, (-0.1, 1.1, NAN, None, "0.5", True, -INF), "a share from 0 to 1")
        for name in ("end_to_end_share", "warmup_share", "decay_share")
    ),
    ("downstream", (-1e-9, NAN, INF, None, "1", True), "a number of at least 0"),
    ("aux_share", (-1e-9, NAN, INF, None, "1", True), "a number of at least 0"),
    ("learning_rate", (0, -1e-3, NAN, INF, "1", True), "a number above 0, or None"),
    (
        "groups",
        ((), (0.5,), (0.5, 0.25, 1.0), (0.5, 0.5, 1.0), (0, 1), (-1, 1), (0.5, 1, 2), (0.5, "1"), (NAN, 1.0),
         (True,), None, 0.5, {"a": 1}, iter([1.0])),
        "shares of the latents above 0, rising to 1",
    ),
    ("seed", (-1, 0.5, None, "0", True, 2**63), "a whole number from 0 to"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [(name, value, says) for name, values, says in WRONG for value in values],
    ids=lambda value: repr(value)[:20],
)
def test_refusals(name: str, value: Any, expected: str) -> None:
    with pytest.raises(InputError) as found:
        TrainingConfig(**{name: value})
    assert str(found.value).startswith(f"TrainingConfig.{name} must be {expected}")
    assert str(found.value).endswith(f"; given {value!r}.") and isinstance(found.value, AutoCircuitError)


@pytest.mark.parametrize("l0", [0.5, 1.5, 0, 2.000001])
def test_topk_keeps_a_whole_number(l0: float) -> None:
    with pytest.raises(InputError, match="l0 must be a whole number for topk"):
        TrainingConfig(architecture="topk", l0=l0)
    if l0 > 0:
        assert TrainingConfig(architecture="relu", l0=l0).l0 == l0


def test_what_is_at_the_edge_is_fine() -> None:
    config = TrainingConfig(
        architecture="topk", l0=1, n_tokens=1, n_latents=1, expansion=1, batch_size=1, context_length=2,
        tokens_per_pass=1, buffer_tokens=1, dead_after_tokens=1, aux_latents=1, aux_share=0, downstream=0,
        learning_rate=1, warmup_share=0, decay_share=1, end_to_end_share=0, seed=2**63 - 1, groups=[1],
    )  # fmt: skip
    assert config.l0 == 1.0 and isinstance(config.l0, float) and config.groups == (1,)
    assert config.n_steps == 1 and config.rate_at(0) == 1.0


def test_settings_are_keywords_and_stay() -> None:
    with pytest.raises(TypeError):
        TrainingConfig("topk")  # type: ignore[misc]
    config = TrainingConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.l0 = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        TrainingConfig(l1=3)  # type: ignore[call-arg]
    assert hash(config) == hash(TrainingConfig())


def test_dead_latents_are_those_silent_for_a_fiftieth() -> None:
    assert TrainingConfig(n_tokens=5_000_000).dead_after == 100_000
    assert TrainingConfig(n_tokens=1_000).dead_after == 10_000
    assert TrainingConfig(dead_after_tokens=7).dead_after == 7


def test_latents() -> None:
    assert TrainingConfig(expansion=3).latents_of(24) == 72
    assert TrainingConfig(expansion=3, n_latents=50).latents_of(24) == 50
    with pytest.raises(InputError, match="among 5"):
        TrainingConfig(n_latents=5).latents_of(24)


@pytest.mark.parametrize(
    ("n_tokens", "batch_size", "n"), [(100, 10, 10), (101, 10, 11), (99, 100, 1), (1, 1, 1)]
)
def test_steps_are_as_many_as_take_all_tokens(n_tokens: int, batch_size: int, n: int) -> None:
    assert TrainingConfig(n_tokens=n_tokens, batch_size=batch_size).n_steps == n


def test_settings_come_back_from_json() -> None:
    config = TrainingConfig(architecture="matryoshka", groups=[0.25, 1], l0=7, learning_rate=1e-3)
    values = json.loads(json.dumps(config.as_dict()))
    assert TrainingConfig(**values) == config and values == config.as_dict()
    assert set(values) == {field.name for field in dataclasses.fields(config)}


# ---- the learning rate --------------------------------------------------------------------------


def rates(n: int, warmup: float, decay: float) -> list[float]:
    config = TrainingConfig(n_tokens=n * 10, batch_size=10, warmup_share=warmup, decay_share=decay)
    found = [config.rate_at(step) for step in range(config.n_steps)]
    assert all(0 < rate <= 1 for rate in found)
    return found


def test_the_rate_rises_stays_and_falls() -> None:
    found = rates(100, 0.1, 0.2)
    assert found[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert found[10:80] == [1.0] * 70
    assert found[80:] == pytest.approx([(20 - i) / 20 for i in range(20)])


def test_without_shares_the_rate_stays() -> None:
    assert rates(50, 0, 0) == [1.0] * 50


def test_the_rate_may_rise_or_fall_all_the_time() -> None:
    assert rates(20, 1, 0) == pytest.approx([(i + 1) / 20 for i in range(20)])
    assert rates(20, 0, 1) == pytest.approx([(20 - i) / 20 for i in range(20)])


def test_the_rate_is_the_lower_where_rise_and_fall_meet() -> None:
    found = rates(20, 1, 1)
    assert found == pytest.approx([min(i + 1, 20 - i) / 20 for i in range(20)]) and max(found) == 0.5
    found = rates(20, 0.8, 0.5)
    top = found.index(max(found))
    assert found[:top] == sorted(found[:top]) and found[top:] == sorted(found[top:], reverse=True)
    assert found[0] == pytest.approx(1 / 16) and found[-1] == pytest.approx(1 / 10)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 50, 1_000])
def test_few_steps_have_a_rate_too(n: int) -> None:
    found = rates(n, 0.02, 0.3)
    assert len(found) == n and max(found) == 1.0
    assert found[-1] == (1.0 if 0.3 * n < 1 else pytest.approx(1 / (0.3 * n)))
    assert found[0] == (1.0 if 0.02 * n < 1 else pytest.approx(1 / (0.02 * n)))


def test_one_step_with_every_share() -> None:
    for warmup, decay in ((0, 0), (1, 0), (0, 1), (1, 1), (0.5, 0.5)):
        assert rates(1, warmup, decay) == [1.0]
