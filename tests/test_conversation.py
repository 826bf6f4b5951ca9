"""Conversations: commands that begin with a slash, what fails in a turn, Ctrl-C, and lines as people type them."""

import io
import json
import os
import stat
import sys
import warnings
from types import SimpleNamespace

import pytest

from mlx_openelm.commands import conversation, line_input
from mlx_openelm.commands.conversation import Conversation
from mlx_openelm.commands.line_input import History, LineInput
from mlx_openelm.errors import MemoryLimitError
from mlx_openelm.generation.chat import Chat
from mlx_openelm.model.openelm import ContextLengthWarning


@pytest.fixture
def typed(monkeypatch):
    """What stdin holds."""

    def given(*lines):
        text = "".join(f"{line}\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    return given


@pytest.fixture
def chat(tiny_model, chat_tokenizer):
    return Chat(tiny_model, chat_tokenizer, max_tokens=3)


def talk(chat):
    Conversation(chat).run("a model")


class TestCommands:
    def test_help_names_every_command(self, chat, typed, capsys):
        typed("/help", "/?")
        talk(chat)
        said = capsys.readouterr().err
        for name in conversation._COMMANDS:
            assert said.count(f"\n{name} ") + said.startswith(f"{name} ") == 2, name
        assert chat.messages == []

    @pytest.mark.parametrize("columns", [40, 60, 80])
    def test_help_fits_the_terminal(self, chat, typed, capsys, monkeypatch, columns):
        monkeypatch.setenv("COLUMNS", str(columns))
        typed("/help")
        talk(chat)
        lines = capsys.readouterr().err.splitlines()
        assert max(map(len, lines[:-1])) <= columns
        assert (len(lines) == len(conversation._COMMANDS) + 1) == (columns == 80)

    @pytest.mark.parametrize("end", ["/quit", "/exit", "/bye", "/QUIT "])
    def test_an_end_is_the_end(self, chat, typed, end):
        typed("Hello", end, "never")
        talk(chat)
        assert [message["content"] for message in chat.messages[::2]] == ["Hello"]

    def test_undo_takes_back_a_message_and_its_answer(self, chat, typed):
        typed("One", "Two", "/undo", "Three")
        talk(chat)
        assert [message["content"] for message in chat.messages[::2]] == ["One", "Three"]
        typed("/undo", "/undo", "/undo")
        talk(chat)
        assert chat.messages == []

    def test_reset_keeps_the_system_message(self, chat, typed):
        typed("/system Be brief.", "One", "/clear")
        talk(chat)
        assert chat.messages == [{"role": "system", "content": "Be brief."}]

    def test_system_shows_sets_and_removes(self, chat, typed, capsys):
        typed("/system", "/system Be  brief.", "One", "/system Be long.", "/system none")
        talk(chat)
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("system message")]
        assert told == [f"system message: {text}" for text in ("none", "Be  brief.", "Be long.", "none")]
        assert [message["role"] for message in chat.messages] == ["user", "assistant"]

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("/foo", "unknown command /foo; see /help"),
            ("/rest", "unknown command /rest; did you mean /reset?"),
            ("/undo 2", "/undo takes nothing after it; got 2"),
            ("/save", "got no name"),
            ("/save chat.csv", "ends in .json, .jsonl, .md or .txt; got chat.csv"),
            ("/save nothing.json", "nothing to save"),
        ],
    )
    def test_mistakes_are_one_line_and_no_message(self, chat, typed, capsys, tmp_path, monkeypatch, line, said):
        monkeypatch.chdir(tmp_path)
        typed(line)
        talk(chat)
        assert chat.messages == []
        err = capsys.readouterr().err
        assert err.startswith("openelm-mlx: error: ")
        assert err.count("\n") == 1
        assert said in err
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("line", ["/usr/bin is a folder?", " /help", "1/2"])
    def test_other_lines_with_slashes_are_messages(self, chat, typed, line):
        typed(line)
        talk(chat)
        assert chat.messages[0]["content"] == line.strip()


class TestSave:
    @pytest.mark.parametrize("name", ["chat.json", "chat.jsonl"])
    def test_json_is_a_record_as_other_commands_read_them(self, chat, typed, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        typed("Héllo", f"/save {name}", "More", f"/save {name}")
        talk(chat)
        (line,) = (tmp_path / name).read_text(encoding="utf-8").splitlines()
        assert json.loads(line) == {"messages": chat.messages}
        assert len(chat.messages) == 4

    def test_text_is_for_people(self, chat, typed, tmp_path):
        typed("/system Be brief.", "Hello", f"/save {tmp_path}/a chat.txt")
        talk(chat)
        text = (tmp_path / "a chat.txt").read_text(encoding="utf-8")
        assert text.startswith("system:\nBe brief.\n\nuser:\nHello\n\nassistant:\n")

    def test_what_another_program_wrote_stays(self, chat, typed, tmp_path, capsys):
        (tmp_path / "chat.json").write_text("precious")
        typed("Hello", f"/save {tmp_path}/chat.json")
        talk(chat)
        assert "already exists" in capsys.readouterr().err
        assert (tmp_path / "chat.json").read_text() == "precious"


class TestTurns:
    def answering(self, reply):
        return SimpleNamespace(reply=lambda line, on_prefill: reply(line))

    def test_a_turn_that_fails_does_not_end_the_conversation(self, typed, capsys):
        def reply(line):
            if line == "too long":
                raise MemoryLimitError(9, 2, 1)
            yield SimpleNamespace(text=f"you said {line}", stats=None)

        typed("too long", "Hello")
        talk(self.answering(reply))
        said = capsys.readouterr()
        assert "error: a prompt of 9 tokens" in said.err
        assert said.out == "you said Hello\n"

    @pytest.mark.parametrize(
        ("error", "said"),
        [
            (RuntimeError("[malloc] Unable to allocate"), "[malloc] Unable to allocate"),
            (MemoryError(), "not enough memory for this turn"),
        ],
    )
    def test_a_turn_that_fails_in_the_middle_does_not_end_the_conversation(self, typed, capsys, error, said):
        def reply(line):
            yield SimpleNamespace(text=f"to {line}", stats=object())
            if line == "first":
                raise error

        typed("first", "second")
        talk(self.answering(reply))
        seen = capsys.readouterr()
        assert seen.err == f"openelm-mlx: error: {said}\n"
        assert seen.out == "to first\n\nto second\n"

    def test_ctrl_c_stops_an_answer(self, typed, capsys):
        def reply(line):
            yield SimpleNamespace(text=f"to {line}", stats=None)
            if line == "first":
                raise KeyboardInterrupt

        typed("first", "second")
        talk(self.answering(reply))
        assert capsys.readouterr() == ("to first\n\nto second\n", "")

    def test_each_time_the_context_is_exceeded_it_says_what_helps(self, typed, capsys):
        def reply(line):
            yield SimpleNamespace(text="x", stats=None)
            warnings.warn("the text is too long", ContextLengthWarning, stacklevel=1)

        typed("first", "second")
        talk(self.answering(reply))
        told = "openelm-mlx: warning: the text is too long; /reset starts a new conversation\n"
        assert capsys.readouterr().err == told * 2


class Keyboard(io.StringIO):
    """A terminal."""

    def isatty(self):
        return True


class TestCtrlC:
    def pressed(self, *found):
        """Stands in for the input: raises errors, gives lines."""
        left = list(found)

        def read(self):
            one = left.pop(0)
            if isinstance(one, BaseException):
                raise one
            return one

        return read

    def test_from_a_pipe_it_ends_the_chat(self, typed, monkeypatch, capsys):
        typed()
        monkeypatch.setattr(LineInput, "read", self.pressed(KeyboardInterrupt()))
        with pytest.raises(SystemExit) as ended:
            talk(None)
        assert ended.value.code == 130
        assert capsys.readouterr().err == "openelm-mlx: error: interrupted\n"

    def test_at_a_prompt_it_clears_the_line_and_then_says_how_to_end(self, chat, monkeypatch, capsys):
        monkeypatch.setattr(sys, "stdin", Keyboard())
        monkeypatch.setattr(
            LineInput,
            "read",
            self.pressed(KeyboardInterrupt(), "Hello", KeyboardInterrupt(), KeyboardInterrupt(), EOFError()),
        )
        talk(chat)
        assert capsys.readouterr().err.count("Ctrl-D or /quit ends the chat.") == 1
        assert chat.messages[0]["content"] == "Hello"


class TestLineInput:
    @pytest.mark.parametrize(
        ("library", "expected"),
        [
            ({"__doc__": "Importing this module enables command line editing using GNU readline."}, True),
            ({"__doc__": "Importing this module enables command line editing using libedit readline."}, False),
            ({"__doc__": "", "backend": "editline"}, False),
        ],
    )
    def test_editing_knows_what_takes_no_space(self, monkeypatch, library, expected):
        monkeypatch.setenv(line_input.HISTORY_VARIABLE, "off")
        monkeypatch.setitem(sys.modules, "readline", SimpleNamespace(**library))
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        assert line_input._with_editing() == ("\x01\x1b[1m\x02> \x01\x1b[0m\x02" if expected else "> ", None)
        monkeypatch.setenv("NO_COLOR", "1")
        assert line_input._with_editing() == ("> ", None)

    def test_the_prompt_goes_to_stderr_where_stdout_is_no_terminal(self, monkeypatch, capsys):
        keyboard = Keyboard()
        keyboard.buffer = io.BytesIO("é\r\n".encode())
        monkeypatch.setattr(sys, "stdin", keyboard)
        lines = LineInput()
        assert lines.read() == "é"
        assert capsys.readouterr() == ("", "> ")
        with pytest.raises(EOFError):
            lines.read()


class TestHistory:
    def history(self, path):
        known = []
        return History(path, SimpleNamespace(add_history=known.append)), known

    def test_a_chat_knows_what_was_typed_in_earlier_ones(self, tmp_path):
        path = tmp_path / "state" / "history"
        history, known = self.history(path)
        assert known == []
        for line in ("Hello", "  ", "two\nlines", "é"):
            history.add(line)
        assert self.history(path)[1] == ["Hello", "two lines", "é"]
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert stat.S_IMODE(os.stat(path.parent).st_mode) == 0o700

    def test_it_does_not_grow_forever(self, tmp_path, monkeypatch):
        monkeypatch.setattr(line_input, "_LONGEST_HISTORY", 3)
        history, _ = self.history(tmp_path / "history")
        for number in range(7):
            history.add(str(number))
        assert self.history(tmp_path / "history")[1] == ["4", "5", "6"]
        assert (tmp_path / "history").read_text() == "4\n5\n6\n"
        assert [path.name for path in tmp_path.iterdir()] == ["history"]

    def test_a_file_that_cannot_be_used_is_no_error(self, tmp_path):
        (tmp_path / "file").write_text("")
        for path in (tmp_path, tmp_path / "file" / "history"):
            self.history(path)[0].add("Hello")
        (tmp_path / "bytes").write_bytes(b"\xff\n")
        assert self.history(tmp_path / "bytes")[1] == ["\ufffd"]

    def test_where_it_is(self, monkeypatch, tmp_path):
        monkeypatch.delenv(line_input.HISTORY_VARIABLE, raising=False)
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
        assert line_input.history_path() == tmp_path / "openelm-mlx" / "chat_history"
        monkeypatch.delenv("XDG_STATE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert line_input.history_path() == tmp_path / ".local/state/openelm-mlx/chat_history"
        monkeypatch.setenv(line_input.HISTORY_VARIABLE, "~/mine")
        assert line_input.history_path() == tmp_path / "mine"
        monkeypatch.setenv(line_input.HISTORY_VARIABLE, "off")
        assert line_input.history_path() is None
