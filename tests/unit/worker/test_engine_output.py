"""What an engine prints goes to the log of each task that is in it."""

from __future__ import annotations

from pathlib import Path

from worker.engine_output import EngineOutput


def test_each_task_gets_what_is_printed_while_it_is_there(tmp_path: Path):
    output = EngineOutput()
    output.attach("t1", tmp_path / "t1.log")
    output.data_received(b"one\n")
    output.attach("t2", tmp_path / "t2.log")
    output.data_received(b"two\nthr")
    output.detach("t1")
    output.data_received(b"ee\n")
    tail = output.tail("t2")
    output.detach("t2")
    output.data_received(b"nobody's\n")

    assert (tmp_path / "t1.log").read_text() == "one\ntwo\nthr"
    assert (tmp_path / "t2.log").read_text() == "two\nthree\n"
    assert tail == ("two", "three")


def test_the_last_words_without_a_newline_count_for_the_last_task(tmp_path: Path):
    output = EngineOutput()
    output.attach("t1", tmp_path / "t1.log")
    output.data_received(b"no newline")
    output.detach("t1")
    output.attach("t2", tmp_path / "t2.log")
    output.data_received(b"next\n")

    assert (output.tail("t1"), output.tail("t2")) == ((), ("next",))
    output.detach("t2")
    assert (tmp_path / "t2.log").read_text() == "next\n"


def test_output_is_a_sign_of_life_of_one_task_or_of_all_that_wait_for_the_load(tmp_path: Path):
    output = EngineOutput()

    def heard() -> bool:
        output.last_heard = 0.0
        output.data_received(b"x\n")
        return output.last_heard > 0.0

    output.attach("t1", tmp_path / "t1.log")
    output.attach("t2", tmp_path / "t2.log")
    loading = heard()
    output.about_all = False
    together = heard()
    output.detach("t2")

    assert (loading, together, heard()) == (True, False, True)
    output.detach("t1")
