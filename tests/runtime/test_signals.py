import os
import signal
import subprocess
import sys
import threading

import pytest

from effdet_jax.runtime.signals import notices

LOOP = """
import time
from effdet_jax.runtime.signals import notices
with notices() as asked:
    print('ready', flush=True)
    while True:
        time.sleep(60)
"""


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_heard_at_the_end_of_the_step_and_handlers_are_put_back(number, capfd):
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    with notices() as asked:
        assert not asked(1)
        os.kill(os.getpid(), number)
        assert asked(2)
        assert signal.getsignal(number) is signal.SIG_DFL
    assert {each: signal.getsignal(each) for each in before} == before
    assert capfd.readouterr().err.strip() == (
        f'{number.name}: finishing this step and saving; send it again to stop at once'
    )


def test_a_second_signal_ends_the_process_at_once():
    process = subprocess.Popen([sys.executable, '-c', LOOP], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'ready\n'
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline() == '\n'
    assert process.stderr.readline().startswith('SIGTERM: finishing this step')
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT
    process.communicate()


def test_in_another_thread_no_signals_are_heard_and_all_else_works():
    heard = []

    def train():
        with notices() as asked:
            heard.append(asked(1))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert heard == [False]
