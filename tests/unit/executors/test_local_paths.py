from pathlib import Path

import pytest

from executors.contract import EnginePolicy
from executors.errors import BadSpecError
from executors.local_paths import confine, find_local


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    (folder / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.json").write_text("{}")
    return folder


def policy(root: Path) -> EnginePolicy:
    return EnginePolicy(allowed_roots=(root,))


@pytest.mark.parametrize("name", ["gpt2", "org/model", "HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen2.5-0.5B"])
def test_hub_names(name: str, root: Path):
    assert find_local(name, "f", policy(root)) is None


def test_relative_names_that_exist_below_the_first_root_are_paths(root: Path):
    assert find_local("models/tiny", "f", policy(root)) == root / "models" / "tiny"
    assert find_local("./models", "f", policy(root)) == root / "models"


def test_absolute_paths_inside(root: Path):
    assert find_local(str(root / "models"), "f", policy(root)) == root / "models"


@pytest.mark.parametrize("value", ["../outside/secret.json", "models/../../outside", "/etc/passwd", "/"])
def test_outside_is_refused_and_the_setting_is_named(value: str, root: Path):
    with pytest.raises(BadSpecError) as caught:
        find_local(value, "spec.data.url", policy(root))
    assert "spec.data.url" in caught.value.message
    assert repr(value) in caught.value.message
    assert str(root) in caught.value.message
    assert "WORKER_ALLOWED_ROOTS" in caught.value.hint


def test_existing_and_missing_files_outside_get_the_same_answer(root: Path):
    texts = set()
    for name in ("secret.json", "absent.json"):
        with pytest.raises(BadSpecError) as caught:
            confine(root.parent / "outside" / name, "f", policy(root))
        texts.add(caught.value.message.replace(name, "X"))
    assert len(texts) == 1


def test_a_link_that_leads_out_is_refused(root: Path):
    (root / "link").symlink_to(root.parent / "outside")
    with pytest.raises(BadSpecError, match="outside the folders"):
        find_local(str(root / "link" / "secret.json"), "f", policy(root))


def test_a_link_that_stays_inside_is_followed(root: Path):
    (root / "link").symlink_to(root / "models")
    assert find_local(str(root / "link"), "f", policy(root)) == root / "models"


def test_a_loop_of_links_is_refused(root: Path):
    (root / "a").symlink_to(root / "b")
    (root / "b").symlink_to(root / "a")
    with pytest.raises(BadSpecError):
        find_local(str(root / "a"), "f", policy(root))


def test_a_missing_path_says_so(root: Path):
    with pytest.raises(BadSpecError, match="does not exist"):
        find_local("data.jsonl", "f", policy(root))


@pytest.mark.parametrize("value", ["http://host/x.json", "file:///etc/passwd", "a\0b"])
def test_urls_and_null_characters_are_refused(value: str, root: Path):
    with pytest.raises(BadSpecError):
        find_local(value, "f", policy(root))


def test_without_roots_no_path_is_readable(root: Path):
    with pytest.raises(BadSpecError, match=r"\(none\)"):
        find_local(str(root), "f", EnginePolicy())


def test_the_workers_own_folders_are_not_readable(root: Path):
    for name in (".worker", ".cache"):
        (root / name).mkdir()
        (root / name / "data.jsonl").write_text("{}")
        with pytest.raises(BadSpecError, match="of the worker's own"):
            find_local(f"{name}/data.jsonl", "f", policy(root))


def test_a_hidden_root_that_the_operator_allows_is_readable(root: Path):
    hidden = root / ".hub"
    hidden.mkdir()
    (hidden / "data.jsonl").write_text("{}")
    allowed = EnginePolicy(allowed_roots=(root, hidden))
    assert find_local(str(hidden / "data.jsonl"), "f", allowed) == hidden / "data.jsonl"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("https://user:hunter2secret@host/m", "'https://***@host/m'"),
        ("https://host/m?sig=hunter2secret", "'https://host/m?sig=***'"),
        ("./https://user:hunter2secret@host/m.json", "'./https://***@host/m.json'"),
    ],
)
def test_a_url_is_named_without_its_secrets(value: str, shown: str, root: Path):
    with pytest.raises(BadSpecError) as caught:
        find_local(value, "spec.model.source.identifier", policy(root))
    assert f"spec.model.source.identifier is {shown}" in caught.value.message
    assert "hunter2secret" not in caught.value.message + caught.value.hint


@pytest.mark.parametrize("value", ["./" + "b" * 100_000, "c/" * 50_000, "/" + "d" * 300])
def test_a_name_that_is_too_long_for_a_path_is_a_short_error(value: str, root: Path):
    with pytest.raises(BadSpecError, match=r"spec\.x is ") as caught:
        find_local(value, "spec.x", policy(root))
    assert len(caught.value.message) < 1000 + len(str(root))


def test_a_long_name_below_the_root_is_no_crash(root: Path):
    assert find_local("a" * 300, "spec.x", policy(root)) is None  # the hub may have it
    with pytest.raises(BadSpecError, match=r"spec\.x is "):
        confine("e" * 300, "spec.x", policy(root))


def test_a_hub_name_that_is_a_path_where_the_worker_runs_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(root.parent)  # libraries would open that folder, though no root allows it
    with pytest.raises(BadSpecError, match="where this worker runs"):
        find_local("outside", "f", policy(root))
    assert find_local("org/model", "f", policy(root)) is None
