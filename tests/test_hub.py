"""Do hub names become folders: once over the network, then from the cache, and with one line when they cannot?"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fake_hub import FakeHub
from gmask.checkpoints.hub import check_name, fetch, find_local, looks_like_hub_name
from gmask.errors import GmaskError

FILES = {
    "config.json": b'{"model_type": "glm"}',
    "README.md": b"# a card",
    "modeling_glm.py": b"raise SystemExit('remote code')",
    "tokenization_glm.py": b"raise SystemExit('remote code')",
    "cog-pretrain.model": b"vocabulary",
    "vocab.json": b"{}",
    "merges.txt": b"a b",
    "pytorch_model.bin": b"w" * 4096,
    "optimizer.bin": b"o" * 4096,
    "runs/config.json": b"{}",
}
WANTED = {"config.json", "cog-pretrain.model", "vocab.json", "merges.txt", "pytorch_model.bin"}
NAME = "THUDM/glm-10b"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    from huggingface_hub import constants

    with FakeHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def fetch_error(name: str, **settings: str) -> str:
    with pytest.raises(GmaskError) as caught:
        fetch(name, **settings)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(name.split("@")[0])
    return message


def test_config_vocabulary_and_weights_are_fetched_and_no_code(hub: FakeHub) -> None:
    hub.add(NAME, FILES)
    folder = fetch(NAME)
    assert names(folder) == WANTED == set(hub.downloads())
    assert (folder / "pytorch_model.bin").read_bytes() == FILES["pytorch_model.bin"]


def test_of_weights_in_both_forms_the_safetensors_alone_are_fetched(hub: FakeHub) -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": b"s" * 512 for i in (1, 2)}
    hub.add(NAME, {**FILES, **shards, "model.safetensors.index.json": b"{}"})
    assert names(fetch(NAME)) == WANTED - {"pytorch_model.bin"} | set(shards) | {"model.safetensors.index.json"}


def test_a_second_fetch_downloads_nothing_and_a_third_needs_no_connection(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub.add(NAME, FILES)
    folder = fetch(NAME)
    hub.asked.clear()
    assert fetch(NAME) == folder
    assert hub.downloads() == []
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(NAME) == folder
    assert hub.asked == []


def test_without_a_connection_the_cache_serves(hub: FakeHub) -> None:
    hub.add(NAME, FILES)
    folder = fetch(NAME)
    hub.__exit__()
    assert fetch(NAME) == folder
    assert "cannot be reached" in fetch_error("THUDM/glm-2b")


def test_each_revision_has_a_folder_of_its_own(hub: FakeHub) -> None:
    new = hub.add(NAME, FILES)
    old = hub.add(NAME, {**FILES, "config.json": b'{"old": true}'}, refs=("v1",))
    assert fetch(NAME).name == fetch(NAME, revision="main").name == new
    assert fetch(NAME, revision="v1").name == fetch(NAME, revision=old).name == old
    assert (fetch(NAME, revision=old) / "config.json").read_bytes() == b'{"old": true}'
    assert "has no revision v9" in fetch_error(NAME, revision="v9")


def test_a_download_whose_connection_breaks_goes_on_where_it_stopped(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 512)
    hub.add(NAME, FILES)
    hub.cut = {"pytorch_model.bin"}
    assert (fetch(NAME) / "pytorch_model.bin").read_bytes() == FILES["pytorch_model.bin"]
    assert [asked for method, _, asked in hub.asked if method == "GET" and asked] == ["bytes=2048-"]


def test_a_download_that_fails_leaves_no_half_file_and_the_next_one_fetches_what_is_missing(hub: FakeHub) -> None:
    hub.add(NAME, FILES)
    hub.lost = {"pytorch_model.bin"}
    assert "try again" in fetch_error(NAME)
    hub.lost.clear()
    hub.gone.clear()
    hub.asked.clear()
    assert (fetch(NAME) / "pytorch_model.bin").read_bytes() == FILES["pytorch_model.bin"]
    assert hub.downloads() == ["pytorch_model.bin"]


def test_half_a_model_in_the_cache_does_not_pass_for_one_offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.add(NAME, FILES)
    hub.lost = {"pytorch_model.bin"}
    fetch_error(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "not whole in the cache" in fetch_error(NAME)


@pytest.mark.parametrize("name", ["ZhipuAI/glm-10b", "zhipuai/GLM-10B", "GLM-10B", "glm-10b"])
def test_names_of_the_catalog_and_of_modelscope_mean_the_model_on_the_hub(hub: FakeHub, name: str) -> None:
    commit = hub.add("THUDM/glm-10b", FILES)
    assert fetch(name).name == commit


def test_a_name_of_the_hub_is_taken_as_it_is(hub: FakeHub) -> None:
    hub.add("THUDM/glm-large-chinese", FILES)
    commit = hub.add("zai-org/glm-large-chinese", {**FILES, "config.json": b"{}"})
    assert fetch("zai-org/glm-large-chinese").name == commit


def test_every_refusal_is_one_line_that_says_what_to_do(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "check the name" in fetch_error("nobody/nothing")
    hub.add("a/gated", FILES)
    hub.refused["a/gated"] = (403, "GatedRepo")
    assert "HF_TOKEN" in fetch_error("a/gated")
    hub.add("a/empty", {"config.json": b"{}"})
    assert "no weights" in fetch_error("a/empty")
    assert "not a name" in fetch_error("a/b--c")
    assert "info --zoo" in fetch_error("glm-11b")
    assert "archive" in fetch_error("GLM-Base")

    def fill_the_disk(*args: object, **settings: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fill_the_disk)
    assert "no space left" in fetch_error("a/gated")


@pytest.mark.parametrize("config", [b'{"model_type": "chatglm", "rmsnorm": true}', b'{"model_type": "glm4"}'])
def test_the_weights_of_another_model_are_not_fetched(hub: FakeHub, config: bytes) -> None:
    hub.add("THUDM/chatglm2-6b", {**FILES, "config.json": config})
    assert "not to a first-generation GLM" in fetch_error("THUDM/chatglm2-6b")
    assert "pytorch_model.bin" not in hub.downloads()


def test_an_unknown_name_is_looked_up_without_its_weights_and_a_known_one_not_at_all(hub: FakeHub) -> None:
    for name in ("bundled", NAME, "GLM-10B", "ZhipuAI/glm-10b", str(Path(__file__).parent)):
        check_name(name)
    assert hub.asked == []
    hub.add("somebody/glm", {**FILES, "config.json": b'{"model_type": "glm", "block_position_encoding": true}'})
    check_name("somebody/glm")
    assert set(hub.downloads()) == WANTED - {"pytorch_model.bin"}
    asked = len(hub.asked)
    check_name("somebody/glm")
    assert len(hub.asked) == asked, "it is in the cache"
    hub.add("somebody/other", {**FILES, "config.json": b'{"model_type": "glm4"}'})
    for name, message in (
        ("nobody/nothing", "check the name"),
        ("somebody/other", "not to a first-generation GLM"),
        ("GLM-Base", "on no hub"),
        ("glm-11b", "no such folder; name the folder of a model, a published model, or bundled"),
        (__file__, "is a file; name the folder of a model"),
    ):
        with pytest.raises(GmaskError) as caught:
            check_name(name)
        assert message in str(caught.value)


def test_a_folder_goes_before_a_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_local(NAME) is None
    Path(NAME).mkdir(parents=True)
    assert find_local(NAME) == Path(NAME)


def test_offline_the_message_names_the_ways_out(hub: FakeHub, offline: None) -> None:
    message = fetch_error(NAME)
    assert "HF_ENDPOINT" in message and "name its folder" in message
    assert "revision v1" in fetch_error(NAME, revision="v1")
    assert hub.asked == []


def test_the_settings_of_the_environment_hold_and_torch_is_not_needed(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(NAME, FILES)
    code = (
        "import sys; from gmask.checkpoints.hub import fetch\n"
        f"print(fetch({NAME!r}))\n"
        "assert 'torch' not in sys.modules"
    )
    places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **places})
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "home")
    assert done.stderr == ""  # the progress bar is for terminals


def test_what_a_hub_name_looks_like() -> None:
    assert all(map(looks_like_hub_name, ["THUDM/glm-10b", "a/b.c_d"]))
    assert not any(map(looks_like_hub_name, ["glm-10b", "./model", "/tmp/model", "a/b/c", "../b", "~/b", "a\\b", ""]))
