"""SIGTERM and SIGINT let the step end; all processes stop after the same one; a second signal waits for nothing."""

import os
import signal
from types import SimpleNamespace

import pytest

from forked import Forked
from latentdiff.training.stopping import STEPS_BETWEEN_QUESTIONS, StopSignals


def accelerator(processes: int = 1, others_asked: bool = False) -> SimpleNamespace:
    """Stands for one of `processes`; `others_asked`: another one of them received a signal."""
    state = SimpleNamespace(trigger=False, ended=False)
    return SimpleNamespace(
        num_processes=processes,
        is_main_process=True,
        set_trigger=lambda: setattr(state, "trigger", True),
        check_trigger=lambda: state.trigger or others_asked,
        end_training=lambda: setattr(state, "ended", True),
        state=state,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_handlers_come_back(number, capsys):
    before = signal.getsignal(number)
    alone = accelerator()
    with StopSignals(alone) as stop:
        assert not stop.requested(1)
        os.kill(os.getpid(), number)
        assert stop.requested(2)
        with pytest.raises(SystemExit) as left:
            stop.leave(2)
    assert left.value.code == 128 + number and alone.state.ended
    said = capsys.readouterr().out
    assert signal.Signals(number).name in said and "stopped after step 2" in said
    assert signal.getsignal(number) is before


def test_processes_agree_on_the_step():
    """One process would save while the others go on and wait for it for ever."""
    first, second = accelerator(2), accelerator(2, others_asked=True)
    with StopSignals(first) as stop, StopSignals(second) as other:
        os.kill(os.getpid(), signal.SIGTERM)  # the inner one notes it: it stands for the process that was told
        assert not stop.requested(STEPS_BETWEEN_QUESTIONS)
        assert not other.requested(STEPS_BETWEEN_QUESTIONS + 1)
        assert other.requested(2 * STEPS_BETWEEN_QUESTIONS) and second.state.trigger


def test_a_second_signal_ends_the_process_at_once():
    program = (
        "import os, signal, time\n"
        "from types import SimpleNamespace\n"
        "from latentdiff.training.stopping import StopSignals\n"
        "with StopSignals(SimpleNamespace(is_main_process=True)):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"  # at once: the launcher passes the same wish on
        "    print('still here', flush=True)\n"
        "    time.sleep(0.6)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('too long', flush=True)\n"
    )
    run = Forked(["-c", program])
    (said,) = run.communicate()
    assert run.returncode == -signal.SIGTERM
    assert "still here" in said and "too long" not in said
