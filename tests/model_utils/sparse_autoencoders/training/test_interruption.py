"""Signals between two steps."""

import os
import signal
import threading

import pytest

from auto_circuit.model_utils.sparse_autoencoders.training.interruption import interruptible

BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def _handlers_as_before() -> object:
    before = {number: signal.getsignal(number) for number in BOTH}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_sets_the_event(number: int) -> None:
    before = [signal.getsignal(each) for each in BOTH]
    with interruptible() as event:
        assert not event.is_set()
        os.kill(os.getpid(), number)
        assert event.wait(5)
    assert [signal.getsignal(each) for each in BOTH] == before


@pytest.mark.parametrize("first", BOTH)
@pytest.mark.parametrize("second", BOTH)
def test_a_second_signal_interrupts_at_once(first: int, second: int) -> None:
    before = [signal.getsignal(each) for each in BOTH]
    reached = False
    with pytest.raises(KeyboardInterrupt), interruptible() as event:
        os.kill(os.getpid(), first)
        assert event.wait(5)
        os.kill(os.getpid(), second)
        threading.Event().wait(5)
        reached = True
    assert not reached and [signal.getsignal(each) for each in BOTH] == before


def test_handlers_come_back_after_an_error() -> None:
    own = [lambda *_args: None, signal.SIG_IGN]
    for number, handler in zip(BOTH, own, strict=True):
        signal.signal(number, handler)
    with pytest.raises(ZeroDivisionError), interruptible():
        assert signal.getsignal(signal.SIGINT) is not own[0]
        _ = 1 / 0
    assert [signal.getsignal(number) for number in BOTH] == own


def test_an_event_is_of_one_run() -> None:
    with interruptible() as first:
        os.kill(os.getpid(), signal.SIGINT)
        assert first.wait(5)
    with interruptible() as second:
        assert not second.is_set()


def test_a_run_within_a_run_gives_the_signals_back() -> None:
    with interruptible() as outer:
        with interruptible() as inner:
            os.kill(os.getpid(), signal.SIGINT)
            assert inner.wait(5) and not outer.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert outer.wait(5)


def test_a_handler_that_python_does_not_know_becomes_the_system_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", _without_knowing(signal.signal))
    with interruptible():
        pass
    assert [signal.getsignal(number) for number in BOTH] == [signal.SIG_DFL, signal.SIG_DFL]


def _without_knowing(plain: object) -> object:
    def set_handler(number: int, handler: object) -> None:
        plain(number, handler)  # type: ignore[operator]  # says nothing of the handler before

    return set_handler


def test_a_thread_leaves_the_signals_alone() -> None:
    before = [signal.getsignal(each) for each in BOTH]
    seen: list[object] = []

    def run() -> None:
        with interruptible() as event:
            seen.extend([event.is_set(), *(signal.getsignal(each) for each in BOTH)])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(5)
    assert seen == [False, *before] and [signal.getsignal(each) for each in BOTH] == before
