"""Each thread finds its forward, in backward too."""

import threading

from lightning_overlap.steps.forward import Forwards


def in_a_thread(function):
    """Returns the result of ``function`` in a thread that outlives the call, as threads of autograd do."""
    answers = []
    thread = threading.Thread(target=lambda: answers.append(function()))
    thread.start()
    thread.join()
    return answers[0]


def test_a_thread_of_autograd_finds_the_forward_whose_backward_runs():
    forwards = Forwards()
    first = forwards.start()

    def asked_before_and_in_backward():
        before = forwards.current
        with forwards.backward(first):
            forwards._threads.forward = None  # as in a thread that has started no forward
            return before, forwards.current

    before, during = in_a_thread(asked_before_and_in_backward)
    assert before is not first
    assert during is first


def test_a_backward_inside_of_another_gives_it_back():
    forwards = Forwards()
    outer, inner = forwards.start(), forwards.start()
    with forwards.backward(outer):
        with forwards.backward(inner):
            assert inner.in_backward
        assert outer.in_backward
        assert not inner.in_backward
        assert in_a_thread(lambda: forwards.current) is outer
    assert not outer.in_backward


def test_what_is_kept_without_a_start_is_found_again():
    forwards = Forwards()
    assert forwards.current is forwards.current
