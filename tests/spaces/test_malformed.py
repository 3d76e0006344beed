"""Whatever is sent to the Space, it answers in one clear line and goes on: 500 malformed uploads and calls."""

import gzip
import http.client
import io
import json
import random
import socket
import struct
import zlib

import numpy as np
import pytest
from arena_client import ArenaClient, file_data, running_arena
from PIL import Image

from onereward.data.synthetic import save_dicom, save_nifti


# what no message may hold: traces of Python and paths of the server
TRACES = ("Traceback", 'File "', "site-packages", ".py", "/tmp", "/root", "/work", "/home", "/usr", "/opt")
TOO_LARGE = 2**40  # a seed that is refused after all files have been read
SCRIPT = "<script>alert('onereward')</script>"
TEXTS = [
    "",
    " ",
    "\x00",
    "\x07\x1b[31m",
    "\u202e",
    "\ud800",
    "'; DROP TABLE vote; --",
    "' OR '1'='1",
    SCRIPT,
    "<img src=x onerror=alert(1)>",
    "../../etc/passwd",
    "file:///etc/passwd",
    "{{7*7}}",
    "%s%n",
    "x" * 600,
    "x" * 10**6,
]
VALUES = [
    *(None, True, False, [], {}, [None], {"a": 1}, 0, -1, 10**30, -(2**63), 1e308),
    *(float("nan"), float("inf"), float("-inf"), [[[[1]]]], {"best": 10**20, "worst": -1}, {"best": 0}),
    *("left", "base", 5.5, *TEXTS),
]


@pytest.fixture
def arena(running_space, tmp_path):
    with running_arena(running_space, tmp_path) as arena:
        yield arena


@pytest.fixture
def rater(arena):
    """Key of somebody who takes part."""
    return arena.ask("join", "radiologist", True, "")["key"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One good file of each form, 32 x 32."""
    folder = tmp_path_factory.mktemp("good")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    for ending in ("png", "jpg", "bmp", "tif", "webp"):
        Image.fromarray(pixels).save(folder / f"a.{ending}")
    save_nifti(np.ones((32, 32, 4), np.int16) * pixels[..., None], folder / "a.nii.gz", model="m", affine=np.eye(4))
    save_nifti(np.ones((32, 32, 4), np.int16) * pixels[..., None], folder / "a.nii", model="m", affine=np.eye(4))
    save_dicom(pixels, folder / "a.dcm", model="m")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".json"}


def mask_file() -> bytes:
    mask = np.zeros((32, 32), np.uint8)
    mask[8:20, 8:20] = 255
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return buffer.getvalue()


# ----------------------------------------------------------------------------------------------------------- the cases


def broken_file(chance: random.Random, files: dict[str, bytes]) -> tuple[str, bytes]:
    """A file that is cut, flipped, of another kind, or lies about its size."""
    name = chance.choice(sorted(files))
    content = bytearray(files[name])
    how = chance.randrange(9)
    if how == 0:
        content = content[: chance.randrange(len(content))]
    elif how in (1, 2):
        for _ in range(chance.choice((1, 8, 64))):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    elif how == 3:  # the header alone is hit
        for _ in range(4):
            content[chance.randrange(min(400, len(content)))] = chance.randrange(256)
    elif how == 4:
        return "a.png", lying_png(*chance.choice([(100_000, 100_000), (2**31 - 1, 1), (0, 0), (3000, 3000)]))
    elif how == 5:
        return "a.nii.gz", gzip.compress(lying_nifti(chance) + bytes(chance.choice((0, 1000, 1 << 26))))
    elif how == 6:
        return "a.dcm", hostile_dicom(chance, bytes(content) if name == "a.dcm" else files["a.dcm"])
    elif how == 7:
        return chance.choice(["a.png", "a.nii", "a.dcm", "a", "a.exe", "a.svg"]), chance.randbytes(
            chance.choice((0, 1, 131, 132, 4000))
        )
    else:
        name = chance.choice(sorted(files))  # one thing named as another
    return name, bytes(content)


def lying_png(width: int, height: int) -> bytes:
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def lying_nifti(chance: random.Random) -> bytes:
    import nibabel as nib

    header = nib.Nifti1Header()
    header.set_data_dtype(chance.choice([np.int16, np.float64, np.uint8]))
    header["magic"], header["vox_offset"], header["sform_code"] = b"n+1", 352, 1
    header["srow_x"], header["srow_y"], header["srow_z"] = np.eye(4)[:3]
    dims = chance.choice([(32767,) * 3, (320, 320, 320), (-3, 4, 5), (0, 4, 5), (256, 256, 256), (32, 32, 1)])
    header["dim"] = [3, *dims, 1, 1, 1, 1]
    name, value = chance.choice(
        [
            ("pixdim", [1, 1e-9, 1, 1, 1, 1, 1, 1]),
            ("scl_slope", np.inf),
            ("vox_offset", 1e30),
            ("srow_x", [1e-7, 0, 0, 0]),
        ]
    )
    header[name] = value
    return header.binaryblock + bytes(4)


def hostile_dicom(chance: random.Random, good: bytes) -> bytes:
    import pydicom

    file = pydicom.dcmread(io.BytesIO(good))
    name, value = chance.choice(
        [
            *(("Rows", 65535), ("Columns", 0), ("NumberOfFrames", 10**6), ("BitsAllocated", 7), ("BitsStored", 64)),
            *(("PixelSpacing", [1e-12, 1]), ("RescaleSlope", 0), ("RescaleSlope", 1e300), ("WindowWidth", -1)),
            *(("PhotometricInterpretation", "CMYK"), ("SamplesPerPixel", 200), ("PixelSpacing", [1, float("inf")])),
            ("ImageOrientationPatient", [0] * 6),
        ]
    )
    with pydicom.config.disable_value_validation():
        setattr(file, name, value)
        if chance.random() < 0.3:
            file.file_meta.TransferSyntaxUID = chance.choice(
                [pydicom.uid.JPEG2000, pydicom.uid.RLELossless, pydicom.uid.DeflatedExplicitVRLittleEndian, "1.2.3"]
            )
        if chance.random() < 0.2:
            del file.PixelData
        buffer = io.BytesIO()
        try:
            pydicom.dcmwrite(buffer, file, enforce_file_format=False)
        except (
            AttributeError,
            ValueError,
            KeyError,
            OverflowError,
            struct.error,
        ):  # what pydicom itself does not write
            return good[: len(good) // 2]
    return buffer.getvalue()


def case(chance: random.Random, arena: ArenaClient, key: str, files: dict[str, bytes]):
    """`(name, status, result, message)` of one malformed call."""
    client = arena.client()
    kind = chance.choice(["file", "file", "type", "type", "path", "id", "text", "body", "choice"])
    if kind == "file":
        name, content = broken_file(chance, files)
        as_mask = chance.random() < 0.25
        other = client.post(f"{arena.api}/upload", files={"files": (name, content)})
        if other.status_code != 200:
            return f"upload {name}", other.status_code, None, other.text
        broken = file_data(other.json()[0])
        good = arena.upload(mask_file(), "mask.png", client)
        # mostly nothing is painted: reading is what is tried, and comes first
        seed = 1 if chance.random() < 0.2 else TOO_LARGE
        pair = (good, broken) if as_mask else (broken, good)
        return f"generate {name}", *arena.generate(*pair, client=client, seed=seed)
    image, mask = arena.upload(mask_file(), "image.png", client), arena.upload(mask_file(), "mask.png", client)
    if kind == "choice":
        name, values = chance.choice(
            [
                ("adapter", [*VALUES, "no/such-adapter", "/etc", "..", "a/b@../../main", "org/x/y", "adapters"]),
                ("axis", ["sideways", "axial'--", 5, [], SCRIPT, "x" * 10**5]),
                ("task", ["FILL", SCRIPT, 3, [], None]),
                *(
                    (name, VALUES)
                    for name in ("prompt", "num_inference_steps", "guidance_scale", "seed", "num_images")
                ),
                *((name, VALUES) for name in ("adapter_strength", "slice", "window_center", "label_map")),
            ]
        )
        other = {"seed": TOO_LARGE} if name not in ("seed", "num_inference_steps", "num_images", "adapter") else {}
        return f"generate {name}", *arena.generate(image, mask, client, **{**other, name: chance.choice(values)})
    if kind == "path":
        path = chance.choice(
            [
                *("/etc/passwd", "../../etc/passwd", "app.py", "study/candidates.parquet", "file:///etc/passwd"),
                *(str(arena.data / "salt"), str(arena.data / "votes.sqlite"), str(arena.temp), image["path"] + "/.."),
                *("http://example.com/a.png", "https://169.254.169.254/latest", "HTTP://EXAMPLE.com/a", "ftp://x/y"),
                *(
                    image["path"].replace("/image.png", "/../../../data/salt"),
                    "\x00",
                    "",
                    "~/.ssh/id_rsa",
                    "/proc/self/environ",
                ),
            ]
        )
        forged = chance.choice(
            [
                file_data(path),
                file_data(image["path"], url=path),
                file_data(path, url="http://example.com/a.png", orig_name="../../x.png", size=-1, is_stream=True),
                {"path": path},
                path,
                [file_data(path)],
                file_data(image["path"], orig_name=path, mime_type=SCRIPT, num_inference_steps=[]),
            ]
        )
        pair = (forged, mask) if chance.random() < 0.5 else (image, forged)
        return f"path {path[:40]}", *arena.generate(*pair, client=client, seed=TOO_LARGE)
    good = {
        "join": ["radiologist", True, ""],
        "next": [key],
        "vote": ["0" * 32, "quality", "left", "", 1.0, key],
        "undo": ["x" * 32],
        "skip": ["0" * 32, "I cannot tell", key],
        "progress": [key],
        "results": ["x" * 22],
        "export": ["x" * 22],
        "report": ["x" * 22],
        "close": [True, "x" * 22],
    }
    name = chance.choice(sorted(good))
    arguments = list(good[name])
    if kind == "type":
        for place in chance.sample(range(len(arguments)), chance.randint(1, len(arguments))):
            arguments[place] = chance.choice(VALUES)
        if chance.random() < 0.2:
            arguments = arguments[: chance.randrange(len(arguments))]
        return name, *arena.call(name, *arguments, client=client)
    if kind == "id":
        forged = chance.choice([chance.randbytes(16).hex(), "' OR 1=1 --", "0" * 31, "g" * 32, "F" * 32, SCRIPT])
        key = chance.choice([key, key[:-1], key + "x", chance.randbytes(18).hex(), "0123456789abcdef" * 2])
        name, arguments = chance.choice(
            [
                ("vote", [forged, "quality", "left", "", 1.0, key]),
                ("skip", [forged, "I cannot tell", key]),
                ("next", [key[:-1]]),
            ]
        )
        return f"{name} forged", *arena.call(name, *arguments, client=client)
    if kind == "text":
        item = arena.ask("next", key, client=client)
        arguments = chance.choice(
            [
                [item["item_id"], item["criteria"][0], chance.choice(TEXTS), "", 1.0, key],
                [item["item_id"], chance.choice(TEXTS), "left", "", 1.0, key],
                [
                    item["item_id"],
                    item["criteria"][0],
                    "left",
                    chance.choice(["x" * 501, "\ud800", "x" * 10**6]),
                    1.0,
                    key,
                ],
                [
                    item["item_id"],
                    item["criteria"][0],
                    "left",
                    "",
                    chance.choice([float("nan"), -1, "x", [], 1e999]),
                    key,
                ],
            ]
        )
        return "vote text", *arena.call("vote", *arguments, client=client)
    method, path, content, headers = chance.choice(
        [
            *(("POST", f"call/{name}", body, {}) for body in (b"", b"{", b"[]", b"null", b'{"data": 5}', b"\xff\xfe")),
            ("POST", f"call/{name}", b"[" * 100_000, {}),
            ("POST", f"call/{name}", b'{"data":' + b"[" * 5000 + b"]" * 5000 + b"}", {}),
            ("POST", f"call/{name}", b'{"data": ["' + b"x" * 10_000_000 + b'"]}', {}),
            *(
                ("RAW", f"call/{name}", length, {})
                for length in (b"99999999999999", b"-5", b"5, 6", b"x", b"1" * 5000)
            ),
            ("POST", "call/no_such_endpoint", b'{"data": []}', {}),
            ("POST", "run/on_answer", b'{"data": []}', {}),
            ("POST", "call/on_close", b'{"data": []}', {}),
            ("POST", "call/v2/vote", b'{"nothing": 1}', {}),
            ("POST", "queue/join", b'{"data": [], "fn_index": 987654, "session_hash": "x"}', {}),
            ("POST", "queue/join", b'{"data": [], "fn_index": -1, "session_hash": "x"}', {}),
            ("POST", "queue/join", b'{"data": [], "fn_index": "x"}', {}),
            ("POST", "component_server", b'{"fn_name": "__init__", "component_id": 1, "session_hash": "x"}', {}),
            ("POST", "upload", b"--x\r\nbad", {"Content-Type": "multipart/form-data; boundary=x"}),
            ("POST", "upload", b"bad", {"Content-Type": "multipart/form-data"}),
            ("POST", "upload", b"bad", {"Content-Type": "text/plain"}),
            ("POST", "cancel", b'{"session_hash": "x", "fn_index": 1, "event_id": "y"}', {}),
            ("POST", "reset", b'{"event_id": []}', {}),
            ("GET", f"call/{name}/no-such-event", None, {}),
            ("GET", "file=/etc/passwd", None, {}),
            ("GET", "file=http://example.com/a", None, {}),
            ("GET", "file=HTTPS://example.com/a", None, {}),
            ("GET", "proxy=http://example.com/a", None, {}),
            ("GET", "deep_link?session_hash=x", None, {}),
            ("GET", "stream/x/y/z/playlist.m3u8", None, {}),
            ("DELETE", f"call/{name}", None, {}),
        ]
    )
    if method == "RAW":
        return f"{method} {path}", *wrong_length(arena, path, content)
    answer = client.request(
        method,
        f"{arena.api}/{path}",
        content=content,
        headers={"Content-Type": "application/json", **headers},
        timeout=20,
    )
    return f"{method} {path}", answer.status_code, None, answer.text


def wrong_length(arena: ArenaClient, path: str, length: bytes) -> tuple[int, None, str]:
    """A request that lies about its length, which no library sends."""
    host, port = arena.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as line:
        head = f"POST /gradio_api/{path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n".encode()
        line.sendall(head + b"Content-Length: " + length + b"\r\n\r\n{}")
        answer = http.client.HTTPResponse(line)  # it reads all of the body, in however many pieces it comes
        answer.begin()
        return answer.status, None, answer.read().decode()


def check(name, status, result, message) -> None:
    if message is None:
        json.dumps(result)  # it was fit after all
        return
    assert status in (200, 400, 403, 404, 405, 413, 422), (name, status, message[:300])
    if status == 200 and message == "":
        return
    if message.startswith("event: error"):
        message = json.loads(message.split("data: ")[-1])
    if status == 422:  # FastAPI quotes what it was sent
        message = " ".join(problem["msg"] for problem in json.loads(message)["detail"])
    assert message and message.strip(), name
    assert len(message) <= 400 and "\n" not in message.strip(), (name, message[:500])
    for trace in TRACES:
        assert trace not in message, (name, message)


def malformed(arena: ArenaClient, rater: str, files, number: int, seed: int) -> dict:
    chance = random.Random(seed)
    before, already = arena.memory(), arena.ask("progress", rater)
    kinds: dict[str, int] = {}
    for place in range(number):
        try:
            name, status, result, message = case(chance, arena, rater, files)
        except Exception as error:
            raise AssertionError(f"case {place} of seed {seed}: {error!r}\n{arena.log.read_text()[-2000:]}") from error
        check(name, status, result, message)
        kinds[name.split()[0]] = kinds.get(name.split()[0], 0) + 1
        assert arena.space.process.poll() is None, (place, name)
        if place % 20 == 19:
            # nothing of this was an answer of theirs
            assert arena.ask("progress", rater) == already, (place, name)
    peak = arena.memory("VmHWM")
    assert peak - before < 400, (before, peak)
    print({"cases": sum(kinds.values()), **kinds, "memory_before": round(before), "memory_peak": round(peak)})
    return kinds


def check_aftermath(arena: ArenaClient) -> None:
    assert not arena.left.exists(), arena.left.read_text()  # no request left this machine
    log = arena.log.read_text()
    assert SCRIPT not in log and "Traceback" not in log
    known = {"salt", "votes.sqlite", "votes.sqlite-wal", "votes.sqlite-shm"}
    known |= {"study.sqlite", "study.sqlite-wal", "study.sqlite-shm"}
    assert {path.name for path in arena.data.iterdir()} <= known


def test_malformed_uploads_and_calls_are_answered_in_one_line(arena, rater, files):
    malformed(arena, rater, files, 120, seed=7)
    check_aftermath(arena)


@pytest.mark.slow
def test_500_malformed_uploads_and_calls_are_answered_in_one_line(arena, rater, files):
    malformed(arena, rater, files, 500, seed=70)
    check_aftermath(arena)
