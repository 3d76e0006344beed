"""Who may do what in the Space, which files it gives out, and that a DICOM file leaves nothing but its pixels."""

import io
import json
import os
import shutil
import stat
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from arena_client import ORGANISER_KEY, file_data, running_arena
from gradio_client import Client
from gradio_client.exceptions import AuthenticationError
from huggingface_hub import HfApi
from PIL import Image

from onereward.data.synthetic import save_dicom


SPACE = Path(__file__).parents[2] / "spaces/onereward-arena"
EXAMPLES = SPACE / "examples"
SCRIPT = "<script>alert('onereward')</script>'; DROP TABLE vote; --"
NAME = b"ZWICKELBACH^EUPHEMIA"  # of nobody


@pytest.fixture(scope="module")
def arena(running_space, tmp_path_factory):
    """Open to all, with a salt of its own making."""
    with running_arena(running_space, tmp_path_factory.mktemp("open"), ONEREWARD_SALT="") as arena:
        yield arena


@pytest.fixture(scope="module")
def hub_arena(running_space, tmp_path_factory):
    """With the login of the Hub, which outside of a Space is that of the token of this process: alice."""
    folder = tmp_path_factory.mktemp("hub")
    study = own_study(folder / "study", organisers=["alice"], answers_per_minute=3)
    settings = {"ONEREWARD_ACCESS": "oauth", "ONEREWARD_STUDY": study}
    with running_arena(running_space, folder, **settings) as arena:
        yield arena


def own_study(folder: Path, **settings) -> Path:
    """The study of the Space with other settings."""
    shutil.copytree(SPACE / "study", folder)
    known = json.loads((folder / "study.json").read_text())
    assert settings.keys() <= known.keys()
    (folder / "study.json").write_text(json.dumps({**known, **settings}))
    return folder


def answer(arena, key: str, **other) -> tuple[dict, list]:
    """One good answer: the question, and the arguments of its vote."""
    item = arena.ask("next", key)
    given = {"item_id": item["item_id"], "criterion": item["criteria"][len(item["answered"])], "answer": "left"}
    given = {**given, "comment": "", "seconds": 1.0, "key": key, **other}
    arena.ask("vote", *given.values())
    return item, list(given.values())


def test_raters_answer_their_own_questions_alone_and_once(arena):
    ann, ben = (arena.ask("join", "radiologist", True, "")["key"] for _ in range(2))
    item, given = answer(arena, ann)
    assert arena.ask("progress", ann)["answered"] == 1

    assert "not a question of yours" in arena.refused("vote", *given[:5], ben)  # another's
    assert "not a question of yours" in arena.refused("skip", item["item_id"], "I cannot tell", ben)
    assert "not a question of yours" in arena.refused("vote", "0" * 32, *given[1:])
    assert "Undo" in arena.refused("vote", *given[:2], "right", *given[3:])  # another answer
    assert arena.ask("vote", *given)["answered"] == 1  # the same one again is acknowledged, and kept once
    assert arena.ask("progress", ann)["answered"] == 1 and arena.ask("progress", ben)["answered"] == 0
    for nobody in ("", "x", ann[:-1], ann + "x", None, 5):
        arena.refused("next", nobody)
    # what two people are asked, and how, tells nothing of the other: ids are their own
    assert arena.ask("next", ben)["item_id"] != arena.ask("next", ann)["item_id"]
    assert not {"model", "seed", "case_id", "pair_id"} & set(arena.ask("next", ben))


def test_results_are_the_organisers_while_a_study_runs_and_a_closed_one_takes_no_votes(arena):
    key = arena.ask("join", "radiologist", True, "")["key"]
    _, given = answer(arena, key, comment=SCRIPT)
    item = arena.ask("next", key)
    for endpoint in ("results", "export", "report"):
        for stranger in ("", key, ORGANISER_KEY[:-1], ORGANISER_KEY + " ", "\ud800" * 20):
            assert "organisers" in arena.refused(endpoint, stranger)
    for stranger in ("", key, "x" * 21):
        assert "organisers" in arena.refused("close", True, stranger)

    rows = pq.read_table(io.BytesIO(arena.download(arena.ask("export", ORGANISER_KEY)))).to_pylist()
    assert SCRIPT in [row["comment"] for row in rows]  # as text
    page = arena.download(arena.ask("report", ORGANISER_KEY)).decode()
    assert "<script>alert" not in page

    assert arena.ask("close", True, ORGANISER_KEY) == {"closed": True}
    closed = "The study is closed"
    assert closed in arena.refused("vote", item["item_id"], item["criteria"][-1], "left", "", 1.0, key)
    assert closed in arena.refused("next", key) and closed in arena.refused("join", "radiologist", True, "")
    assert arena.ask("vote", *given)["answered"] == 1  # what was kept is acknowledged still
    assert len(arena.ask("results", "")["votes"]) == len(rows)  # now everybody may see
    assert "organisers" in arena.refused("close", False, key)
    assert arena.ask("close", False, ORGANISER_KEY) == {"closed": False}
    assert arena.ask("progress", key)["answered"] == 1


def test_nothing_but_ones_own_files_is_given_out(arena):
    arena.ask("join", "radiologist", True, "")
    assert stat.S_IMODE((arena.data / "salt").stat().st_mode) == 0o600
    upload = arena.upload((EXAMPLES / "0-image.png").read_bytes(), "a.png")
    folder = Path(upload["path"]).parent
    secrets = [arena.data / "salt", arena.data / "votes.sqlite", arena.data / "study.sqlite", arena.log]
    secrets += [SPACE / "app.py", SPACE / "study/candidates.parquet", SPACE / "study/study.json", Path("/etc/passwd")]
    client = arena.client()
    for secret in secrets:
        assert secret.is_file()
        relative = os.path.relpath(secret, SPACE)
        above = folder / os.path.relpath(secret, folder)
        for path in (secret, relative, f"./{relative}", above, f"/{secret}", str(above).replace("..", "%2e%2e")):
            found = client.get(f"{arena.api}/file={path}")
            assert found.status_code in (403, 404) and secret.read_bytes()[:64] not in found.content, (path, found)
            message = arena.generate(file_data(str(path)), upload)[2]
            assert message and ("not uploaded here" in message or "upload is gone" in message), (path, message)
            for extra in ({"key": file_data(str(path))}, file_data(str(path))):  # as a text that comes back
                assert "path" not in str(arena.call("join", "radiologist", True, extra)[1])
    for path in (folder, folder.parent, arena.temp, "", ".", "study", arena.data):
        assert client.get(f"{arena.api}/file={path}").status_code in (403, 404)
    assert client.get(f"{arena.api}/file={upload['path']}").status_code == 200


def test_addresses_are_not_fetched(arena):
    good = arena.upload((EXAMPLES / "0-image.png").read_bytes(), "a.png")
    for address in (
        "http://example.com/a.png",
        "https://huggingface.co/x",
        "HTTP://example.com",
        "ftp://example.com/a",
    ):
        assert "addresses are not fetched" in arena.generate(file_data(address), good)[2]
        for route in ("file=", "proxy=", "file/"):
            assert arena.client().get(f"{arena.api}/{route}{address}").status_code in (403, 404)
    assert not arena.left.exists(), arena.left.read_text()


def test_limits_of_size_and_speed(arena):
    small = (EXAMPLES / "0-image.png").read_bytes()
    mask = (EXAMPLES / "0-mask.png").read_bytes()
    client = arena.client()
    too_much = client.post(f"{arena.api}/upload", files={"files": ("a.nii", bytes(2**26 + 1))})
    assert too_much.status_code == 413 and "Traceback" not in too_much.text
    many = client.post(f"{arena.api}/upload", files=[("files", (f"{n}.nii", bytes(2**25))) for n in range(3)])
    assert many.status_code == 413
    wide = io.BytesIO()
    Image.new("L", (3000, 2000)).save(wide, "PNG")
    message = arena.generate(arena.upload(wide.getvalue(), "a.png"), arena.upload(mask, "m.png"))[2]
    assert "3000 x 2000 pixels" in message and "4,194,304" in message

    pair = [arena.upload(small, "a.png", client), arena.upload(mask, "m.png", client)]
    messages = [arena.generate(*pair, client=client, seed=2**40)[2] for _ in range(21)]
    assert all("`seed`" in message for message in messages[:20]), messages
    assert "more than 20 a minute" in messages[20]
    assert "`seed`" in arena.generate(*pair, seed=2**40)[2]  # somebody else is not kept waiting

    for place in range(31):
        message = arena.refused("results", f"a guess of the key, {place}", client=client)
    assert "more than 30 a minute" in message


def test_a_password_list_lets_in_those_who_are_on_it(running_space, tmp_path):
    users = {"ONEREWARD_ACCESS": "password", "ONEREWARD_USERS": "ann:correct horse,ben:battery staple"}
    with running_arena(running_space, tmp_path, **users) as arena:
        check_passwords(arena)


def check_passwords(arena):
    with pytest.raises((AuthenticationError, ValueError)):
        Client(arena.url, verbose=False)
    with pytest.raises((AuthenticationError, ValueError)):
        Client(arena.url, auth=("ann", "battery staple"), verbose=False)
    for path in ("info", "call/next/x", "file=/etc/passwd", "queue/data?session_hash=x"):
        assert arena.client().get(f"{arena.api}/{path}").status_code == 401
    assert arena.client().post(f"{arena.api}/call/next", json={"data": [""]}).status_code == 401
    assert arena.client().post(f"{arena.api}/upload", files={"files": ("a.png", b"x")}).status_code == 401

    ann, ben = (
        Client(arena.url, auth=pair, verbose=False) for pair in (("ann", "correct horse"), ("ben", "battery staple"))
    )
    ann.predict("radiologist", True, "", api_name="/join"), ben.predict("lay", True, "", api_name="/join")
    item = ann.predict("", api_name="/next")
    ann.predict(item["item_id"], item["criteria"][0], "left", "", 1, "", api_name="/vote")
    # the login counts, and no key that somebody passes
    assert ann.predict("x" * 32, api_name="/progress")["answered"] == 1
    assert ben.predict("x" * 32, api_name="/progress")["answered"] == 0
    client = arena.client()
    tries = [client.post(f"{arena.url}/login", data={"username": "ann", "password": "guess"}) for _ in range(21)]
    assert {one.status_code for one in tries[:20]} == {400} and tries[20].status_code == 429


def test_a_login_at_the_hub_is_who_votes(hub_arena):
    arena = hub_arena
    stranger = arena.client()
    assert "sign in" in arena.refused("next", "", client=stranger)
    assert "sign in" in arena.refused("join", "lay", True, "x" * 32, client=stranger)
    assert "organisers" in arena.refused("results", "alice", client=stranger)

    alice = arena.client(follow_redirects=True)
    login = alice.get(f"{arena.url}/login/huggingface")  # outside of a Space, the login of this machine
    assert login.status_code == 200
    # the cookie is for HTTPS alone, which browsers take this machine for
    alice.headers["Cookie"] = "; ".join(f"{one.name}={one.value}" for one in alice.cookies.jar)
    arena.ask("join", "lay", True, "", client=alice)
    item = arena.ask("next", "", client=alice)
    arena.ask("vote", item["item_id"], item["criteria"][0], "left", "", 1, "", client=alice)
    assert len(arena.ask("results", "", client=alice)["votes"]) == 1  # an organiser by her name
    for _ in range(2):
        item = arena.ask("next", "", client=alice)
        given = (item["item_id"], item["criteria"][len(item["answered"])], "left", "", 1, "")
        arena.ask("vote", *given, client=alice)
    item = arena.ask("next", "", client=alice)
    given = (item["item_id"], item["criteria"][len(item["answered"])], "left", "", 1, "")
    assert "faster than 3 answers a minute" in arena.refused("vote", *given, client=alice)
    assert arena.ask("progress", "", client=alice)["answered"] == 3
    assert arena.ask("close", True, "", client=alice) == {"closed": True}
    assert "sign in" in arena.refused("progress", "", client=stranger)


def test_adapters_come_from_the_list_or_the_public_hub_and_are_no_pickles(hub_arena, hub, tmp_path):
    arena, api = hub_arena, HfApi()
    for name, private, path in (
        ("alice/pickled-adapter", False, "adapter_model.bin"),
        ("alice/hidden-adapter", True, "pytorch_lora_weights.safetensors"),
    ):
        api.create_repo(name, private=private)
        api.upload_file(path_or_fileobj=b"not weights", path_in_repo=path, repo_id=name)
    pair = [arena.upload((EXAMPLES / f"0-{name}.png").read_bytes(), f"{name}.png") for name in ("image", "mask")]
    for adapter, words in (
        ("alice/pickled-adapter", "pickle files can run code"),
        ("alice/hidden-adapter", "shows no 'alice/hidden-adapter'"),
        ("alice/nothing", "shows no 'alice/nothing'"),
        ("../../etc", "nor a Hub id"),
        (str(tmp_path), "nor a Hub id"),
        ("alice/..", "nor a Hub id"),
        ("https://huggingface.co/a/b", "nor a Hub id"),
        (["base"], "nor a Hub id"),
    ):
        _, results, message = arena.generate(*pair, adapter=adapter)
        assert results is None and words in message and "\n" not in message, (adapter, message)
        assert str(tmp_path) not in message or adapter == str(tmp_path)
    assert arena.generate(*pair)[2] is None
    assert not arena.left.exists()


def test_a_mask_of_ones_is_a_mask_and_what_is_removed_may_have_labels(arena):
    image = arena.upload((EXAMPLES / "0-image.png").read_bytes(), "image.png")
    mask = np.asarray(Image.open(EXAMPLES / "0-mask.png"))
    painted = {}
    for name, values in (("white", mask), ("ones", mask // 255), ("labels", np.where(mask, 2, 0).astype(np.uint8))):
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, "PNG")
        for task in ("fill", "remove"):
            _, results, message = arena.generate(image, arena.upload(buffer.getvalue(), f"{name}.png"), task=task)
            assert message is None, (name, task, message)
            painted[name, task] = arena.download(results[0][0])
    pixels = {key: np.asarray(Image.open(io.BytesIO(content))) for key, content in painted.items()}
    for task in ("fill", "remove"):
        assert np.array_equal(pixels["ones", task], pixels["white", task])
    assert np.array_equal(pixels["labels", "remove"], pixels["white", "remove"])
    assert not np.array_equal(pixels["labels", "fill"], pixels["white", "fill"])


def test_of_a_dicom_file_nothing_stays_but_its_pixels(arena, tmp_path):
    import pydicom

    pixels = np.asarray(Image.open(EXAMPLES / "0-image.png").convert("L"))
    save_dicom(pixels, tmp_path / "a.dcm", model="m")
    file = pydicom.dcmread(tmp_path / "a.dcm")
    text = NAME.decode()
    file.PatientName = file.PatientID = file.InstitutionName = file.ReferringPhysicianName = file.StudyID = text
    file.SeriesDescription = file.ImageComments = text
    file.preamble = NAME.ljust(128, b"\0")
    file.add_new(0x00091010, "LO", text)
    file.save_as(tmp_path / "a.dcm")
    content = (tmp_path / "a.dcm").read_bytes()
    assert content.count(NAME) >= 7
    (tmp_path / "a.dcm").unlink()

    mask = arena.upload((EXAMPLES / "0-mask.png").read_bytes(), "mask.png")
    found = arena.upload(content, f"{text.replace('^', '_')}.dcm")
    assert NAME in Path(found["path"]).read_bytes()
    status, results, message = arena.generate(found, mask, num_images=2)
    assert status == 200 and message is None
    pictures, archive, _ = results
    downloads = [arena.download(one) for one in (*pictures, archive)]
    with zipfile.ZipFile(io.BytesIO(downloads[-1])) as opened:
        downloads += [opened.read(name) for name in opened.namelist()]
        assert sum(name.endswith(".dcm") for name in opened.namelist()) == 2
    assert "send it again" in arena.generate(found, mask)[2]

    # cut, it cannot be read, and does not stay either
    cut = arena.upload(content[: len(content) // 2], f"{text.replace('^', '_')}.dcm")
    assert arena.generate(cut, mask)[2]
    answer(arena, arena.ask("join", "radiologist", True, "")["key"])
    places = [*arena.temp.parent.rglob("*"), arena.log]
    for content in [*downloads, *(place.read_bytes() for place in places if place.is_file())]:
        for part in (NAME, b"ZWICKELBACH", b"EUPHEMIA", text.encode("utf-16-le")):
            assert part not in content and part.lower() not in content
    assert not [place for place in places if "ZWICKELBACH" in place.name]
    assert any(place.is_relative_to(arena.temp) for place in places)
