"""The right frames of every kind of container, to the bit, and a named cause where there are none."""

import os
import resource
import shutil
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from stgcma_fast.data import video
from stgcma_fast.data.errors import MediaError
from stgcma_fast.data.sample import Frames
from stgcma_fast.data.video import frame_indices, read_frames
from tests.data.conftest import frame_number, numbered_frame

COUNT = 40
H265 = {"codec": "libx265", "options": {"x265-params": "log-level=0:keyint=15:open-gop=1"}}
KINDS = {
    "h264_bframes.mp4": {},
    "h264_faststart.mp4": {"container_options": {"movflags": "faststart"}, "options": {"g": "12", "bf": "3"}},
    "h264_fragments.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}, "options": {"g": "8"}},
    "h264_open_gop.mkv": {"options": {"g": "10", "x264-params": "open-gop=1"}},
    "h264_intra_refresh.mp4": {"options": {"g": "10", "x264-params": "intra-refresh=1"}},
    "h264_interlaced.mp4": {"options": {"g": "10", "x264-params": "interlaced=1"}},
    "h264_without_times.avi": {},
    "h264_late.mp4": {"times": range(50, 50 + COUNT)},
    "h264.ts": {},
    "h264_raw.h264": {},
    "hevc.mp4": H265,
    "mpeg4.avi": {"codec": "mpeg4"},
    "mpeg4_bframes.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "mpeg4_bframes.mp4": {"codec": "mpeg4", "options": {"bf": "2"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "16"}},
    "vp8_ntsc.webm": {"codec": "libvpx", "fps": Fraction(30000, 1001)},
    "mjpeg.mov": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "mjpeg.avi": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "12", "svtav1-params": "lp=1"}},
    "ten_bits.mkv": {"pixels": "yuv420p10le"},
    "grey.mkv": {"codec": "ffv1", "pixels": "gray"},
}


def linspace(count, slots, of):
    return [int(np.linspace(1, count, of)[slot]) - 1 for slot in slots]


def decode(path):
    """Every frame, by PyAV alone."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def packets(path):
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size, bytes(packet)) for packet in container.demux(video=0) if packet.size]


def read(path, of=10, slots=None):
    return read_frames(Frames(path, tuple(range(of) if slots is None else slots), of))


def numbers(images):
    return [frame_number(image) for image in images]


def overwrite(path, position, data):
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(data)


@pytest.fixture(scope="module")
def clips(make_video, tmp_path_factory):
    """A path for each of `KINDS`, written when it is first asked for."""
    folder = tmp_path_factory.mktemp("clips")

    def clip(name):
        path = folder / name
        return path if path.exists() else make_video(path, frames=COUNT, **KINDS[name])

    return clip


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_those_of_a_full_decode(name, clips):
    """The frames are the ones that were asked for, and leaving out others changes no pixel of them."""
    path = clips(name)
    every = decode(path)
    assert numbers(every) == list(range(COUNT))
    for of, slots in ((10, range(10)), (60, (59, 7, 7, 30)), (1, (0,)), (3, (1,))):
        expected = linspace(COUNT, slots, of)
        assert frame_indices(path, slots, of) == expected
        images = read(path, of, slots)
        assert images.dtype == torch.uint8
        assert np.array_equal(images.numpy(), np.stack([every[index] for index in expected]))


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("name", ["h264_bframes.mp4", "vp9.webm", "mpeg4.avi"])
def test_fewer_frames_than_places(name, count, make_video, tmp_path):
    path = make_video(tmp_path / name, frames=count, **KINDS[name])
    assert numbers(read(path)) == frame_indices(path, range(10), 10) == linspace(count, range(10), 10)


def on_screen(times, slots, of):
    """Which frame shows when a constant rate would have shown the slot's."""
    step = Fraction(times[-1] - times[0], len(times) - 1)
    moments = [times[0] + index * step for index in linspace(len(times), slots, of)]
    return [max(index for index, time in enumerate(times) if time <= moment) for moment in moments]


@pytest.mark.parametrize("name", ["h264_bframes.mp4", "vp9.webm", "mpeg4_bframes.mp4"])
def test_variable_rate(name, make_video, tmp_path):
    """Frames come later and later, then all at once: not every fourth is taken, but what shows at equal distances."""
    times = [index * index * 40 for index in range(20)] + [19 * 19 * 40 + 40 * index for index in range(1, 21)]
    path = make_video(tmp_path / name, frames=COUNT, times=times, time_base=Fraction(1, 1000), **KINDS[name])
    expected = on_screen(times, range(10), 10)
    assert expected != linspace(COUNT, range(10), 10)
    assert frame_indices(path, range(10), 10) == numbers(read(path)) == expected


def test_rounded_times_are_a_constant_rate(make_video, tmp_path):
    """WebM has whole milliseconds: 29.97 frames a second come at 33 and 34. Every frame is found, at any number of places."""
    path = make_video(tmp_path / "clip.webm", frames=200, codec="libvpx", size=(16, 16), fps=Fraction(30000, 1001))
    with av.open(str(path)) as container:
        times = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert len(set(np.diff(times))) > 1
    for of in (200, 60, 10):
        assert frame_indices(path, range(of), of) == linspace(200, range(of), of)


def test_edit_list(make_video, tmp_path):
    """What lies before time 0 in an mp4 is decoded for others' sake, but it is not part of the clip."""
    path = make_video(tmp_path / "clip.mp4", frames=COUNT, times=range(-5, COUNT - 5), options={"g": "16"})
    assert len(packets(path)) == COUNT
    assert numbers(decode(path)) == list(range(5, COUNT))
    assert numbers(read(path)) == [5 + index for index in linspace(COUNT - 5, range(10), 10)]


def test_hidden_frames_of_vp8(make_video, tmp_path):
    """A frame of VP8 that is there only for others to refer to is a packet, but never displayed."""
    path = make_video(tmp_path / "clip.webm", frames=12, codec="libvpx")
    data = path.read_bytes()
    for hidden in (5, 9):
        packet = packets(path)[hidden][2]
        overwrite(path, data.index(packet), bytes([packet[0] & ~0x10]))
    shown = [0, 1, 2, 3, 4, 6, 7, 8, 10, 11]
    assert len(packets(path)) == 12
    assert numbers(decode(path)) == shown
    assert numbers(read(path)) == [shown[index] for index in on_screen([40 * number for number in shown], range(10), 10)]


def test_headers_are_not_believed(clips, tmp_path):
    """An AVI's header says how many frames there are; this one says 9999."""
    path = shutil.copy(clips("mpeg4.avi"), tmp_path / "clip.avi")
    overwrite(path, path.read_bytes().index(b"strh") + 8 + 32, struct.pack("<I", 9999))
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 9999
    assert numbers(read(path)) == linspace(COUNT, range(10), 10)


def test_content_decides_not_the_name(clips, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("clip.avi", "clip.jpg", "--_x.mp4", "clip:1.mp4", "100%d.mp4"):
        path = shutil.copy(clips("h264_bframes.mp4"), name)
        assert numbers(read(type(tmp_path)(path))) == linspace(COUNT, range(10), 10)


@pytest.mark.parametrize("size", [(321, 241), (241, 321), (48, 64), (16, 12)])
def test_sizes(size, make_video, tmp_path):
    path = make_video(tmp_path / "clip.webm", frames=3, codec="libvpx-vp9", size=size)
    assert read(path, 3).shape == (3, size[1], size[0], 3)
    assert np.array_equal(read(path, 3).numpy(), np.stack(decode(path)))


@pytest.mark.parametrize(("rotation", "turned"), [(90, 1), (180, 2), (-90, 3)])
def test_turned_as_displayed(rotation, turned, make_video, tmp_path):
    """A telephone's portrait clip lies on its side in the file, with the turn (counter-clockwise) in the header."""
    path = make_video(tmp_path / "clip.mp4", frames=3, rotation=rotation)
    flat = decode(path)
    upright = np.stack([np.rot90(image, turned) for image in flat])
    assert np.array_equal(read(path, 3).numpy(), upright)
    assert upright.shape == ((3, 64, 48, 3) if turned % 2 else (3, 48, 64, 3))


ANGLES = {0: 0, -1: 0, 30: 0, -30: 0, 89: 3, 91: 3, -89: 1, -91: 1, 179: 2, -179: 2}


@pytest.mark.parametrize(("angle", "turned"), [*ANGLES.items(), (None, 0)])
def test_turned_to_the_nearest_quarter(angle, turned, make_video, tmp_path):
    """A turn of 1 degree to the right was one of 90, one of 89 was none, and one by a matrix of zeros upside down."""
    path = make_video(tmp_path / "clip.mp4", frames=3)
    flat = decode(path)
    cos, sin = (0, 0) if angle is None else (round(65536 * wave(np.radians(angle))) for wave in (np.cos, np.sin))
    matrix = struct.pack(">9i", cos, sin, 0, -sin, cos, 0, 0, 0, angle is not None and 1 << 30)
    overwrite(path, path.read_bytes().index(b"tkhd") + 44, matrix)
    assert np.array_equal(read(path, 3).numpy(), np.stack([np.rot90(image, turned) for image in flat]))


def test_size_changes_midway(make_video, tmp_path):
    path = tmp_path / "clip.h264"
    parts = [make_video(tmp_path / f"{size[0]}.h264", frames=10, size=size) for size in ((64, 48), (32, 32))]
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(MediaError, match=r"clip.h264: its frames change size, from 64x48 to 32x32"):
        read(path)


CUTS = [
    "h264_faststart.mp4",
    "h264_fragments.mp4",
    "h264_open_gop.mkv",
    "h264_without_times.avi",
    "mpeg4.avi",
    "vp9.webm",
    "mjpeg.avi",
]


@pytest.mark.parametrize("name", CUTS)
def test_cut_off(name, make_video, tmp_path):
    """A download that broke off. The clip lasts 4 seconds, for of Matroska only a missing second is noticed."""
    path = make_video(tmp_path / name, frames=COUNT, fps=10, **KINDS[name])
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    for look in (frame_indices, lambda *args: read(args[0])):
        with pytest.raises(MediaError, match=rf"{name}: it is cut off or damaged: data is missing after \d+ frames"):
            look(path, (0,), 10)


def test_cut_off_at_the_end_of_a_frame(make_video, tmp_path):
    path = make_video(tmp_path / "clip.mp4", frames=COUNT, **KINDS["h264_faststart.mp4"])
    position, size, _ = packets(path)[20]
    os.truncate(path, position + size)
    with pytest.raises(MediaError, match="cut off"):
        read(path)


def test_cut_off_before_the_index(clips, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(clips("h264_bframes.mp4").read_bytes()[:5000])
    with pytest.raises(MediaError, match=r"clip.mp4: it can not be read: Invalid data"):
        read(path)


def lose(path, number, share, target):
    """Write ``target``: the clip with zeros in place of the last ``share`` of a packet."""
    data = bytearray(path.read_bytes())
    packet = packets(path)[number][2]
    end = data.index(packet) + len(packet)
    lost = int(len(packet) * share)
    data[end - lost : end] = bytes(lost)
    target.write_bytes(data)
    return target


HALF = ["h264_bframes.mp4", "h264_open_gop.mkv", "h264_without_times.avi", "mpeg4.avi", "mjpeg.mov", "av1.mp4", "ten_bits.mkv"]
WHOLE = ["hevc.mp4", "mpeg4_bframes.mp4", "vp8_ntsc.webm", "vp9.webm"]


@pytest.mark.parametrize(("name", "share"), [*((name, 0.5) for name in HALF), *((name, 1) for name in WHOLE)])
def test_damaged(name, share, clips, tmp_path):
    """Where data is lost that wanted frames depend on, nothing is made up, as FFmpeg would."""
    path = lose(clips(name), linspace(COUNT, (5,), 10)[0], share, tmp_path / name)
    with pytest.raises(MediaError, match=rf"{name}: it is damaged: frame \d+ of \d+ can not be decoded"):
        read(path)
    # Frames before it are read.
    assert numbers(read(path, slots=(0, 1))) == linspace(COUNT, (0, 1), 10)


GROUPS = {
    "h264.mp4": {"options": {"g": "8", "bf": "2", "x264-params": "scenecut=0:b-adapt=0"}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=0:keyint=8:min-keyint=8:open-gop=0:b-adapt=0"}},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"g": "8", "bf": "2", "flags": "+cgop", "sc_threshold": "1000000000"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "8"}},
    "mjpeg.avi": {"codec": "mjpeg", "pixels": "yuvj420p"},
}


@pytest.mark.parametrize("name", GROUPS)
def test_only_what_is_needed_is_decoded(name, make_video, tmp_path):
    """Damage in the third group of eight frames does not hinder frames of the first and the last two."""
    whole = make_video(tmp_path / f"whole_{name}", frames=COUNT, **GROUPS[name])
    path = lose(whole, 17, 1, tmp_path / name)
    wanted = [0, 5, 6, 7, 25, 30, 31, 38]
    every = decode(whole)
    assert np.array_equal(read(path, COUNT, wanted).numpy(), np.stack([every[index] for index in wanted]))
    with pytest.raises(MediaError, match="it is damaged: frame"):
        read(path, COUNT, range(COUNT))


def test_frames_shown_before_their_keyframe(make_video, tmp_path):
    """Such a frame follows the keyframe in the file, but depends on the group before it; on none that is earlier."""
    options = {"g": "8", "bf": "2", "sc_threshold": "1000000000"}
    whole = make_video(tmp_path / "whole.mp4", frames=COUNT, codec="mpeg4", options=options)
    with av.open(str(whole)) as container:
        order = [(packet.pts, packet.is_keyframe) for packet in container.demux(video=0) if packet.size]
    key = [index for index, (_, is_key) in enumerate(order) if is_key][2]
    leading = sorted(time for time, _ in order).index(order[key + 1][0])
    assert order[key + 1][0] < order[key][0]
    path = lose(whole, 1, 1, tmp_path / "clip.mp4")
    assert np.array_equal(read(path, COUNT, (leading,))[0].numpy(), decode(whole)[leading])


def test_names_within_need_not_be_text(clips, tmp_path):
    """A title in another encoding."""
    path = tmp_path / "clip.mp4"
    path.write_bytes(clips("h264_bframes.mp4").read_bytes().replace(b"Lavf", b"\xe9\xff\xfe\xfd"))
    assert numbers(read(path)) == linspace(COUNT, range(10), 10)


def test_refusals(make_video, tmp_path, monkeypatch):
    """What is not a video says so, with the file's name."""
    sound = make_video(tmp_path / "clip.mp4", frames=3, audio=np.zeros((1, 16000), np.float32))
    with av.open(str(sound)) as source, av.open(str(tmp_path / "sound.m4a"), "w") as target:
        stream = target.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    (tmp_path / "zero.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video\n" * 99)
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(9999))
    make_video(tmp_path / "wide.avi", frames=1, size=(8208, 16), codec="mjpeg", pixels="yuvj420p")
    make_video(tmp_path / "sliver.avi", frames=1, size=(16, 528), codec="mjpeg", pixels="yuvj420p")
    causes = {
        "missing.mp4": "there is no such file",
        ".": "it is a folder, not a file",
        "zero.mp4": r"it is empty \(0 bytes\)",
        "text.mp4": "it can not be read: Invalid data found",
        "noise.mp4": "it can not be read: Invalid data found",
        "sound.m4a": "it has no video track, only audio",
        "wide.avi": "its frames are 8208x16; at most 8192 a side are read",
        "sliver.avi": "its frames are 16x528; at most 8192 a side are read, and 32 times the other side",
    }
    before = os.listdir("/proc/self/fd")
    for name, cause in causes.items():
        for look in (frame_indices, lambda path, *_: read(path)):
            with pytest.raises(MediaError, match=cause) as raised:
                look(tmp_path / name, (0,), 1)
            assert raised.value.path == str(tmp_path / name)
    read(sound, 3)
    assert os.listdir("/proc/self/fd") == before, "a file was left open"

    def refuse(*args, **kwargs):
        raise av.error.PermissionError(13, "Permission denied", args[0])

    monkeypatch.setattr(av, "open", refuse)
    with pytest.raises(MediaError, match="it can not be read: Permission denied"):
        read(sound)


def test_a_folder_that_may_not_be_entered(clips, monkeypatch):
    """It was told that there is no such file."""
    path = clips("h264_bframes.mp4")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", args[0])

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(MediaError, match="it can not be read: Permission denied"):
        read(path)


def test_names_that_no_file_can_have():
    for name, cause in (("a\0b.mp4", "there is no such file"), ("x" * 300, "it can not be read: File name too long")):
        with pytest.raises(MediaError, match=cause):
            read(Path(name))
    with pytest.raises(MediaError, match="there is no such file"):
        read(Path(__file__, "clip.mp4"))


def test_frames_larger_than_the_header_says(make_video, tmp_path, monkeypatch):
    """The decoder refuses them before it allocates them."""
    monkeypatch.setattr(video, "LARGEST_SIDE", 64)
    parts = [make_video(tmp_path / f"{side}.h264", frames=9, size=(side, side)) for side in (64, 128)]
    (tmp_path / "clip.h264").write_bytes(b"".join(part.read_bytes() for part in parts))
    assert read(parts[0], 3).shape == (3, 64, 64, 3)
    with pytest.raises(MediaError, match=r"it is damaged: frame \d+ of 18 can not be decoded"):
        read(tmp_path / "clip.h264", 3)


def test_a_picture_of_the_cover_is_no_video(make_video, tmp_path):
    path = tmp_path / "song.mp4"
    sound = make_video(
        tmp_path / "clip.mp4", frames=1, codec="mjpeg", pixels="yuvj420p", audio=np.zeros((1, 16000), np.float32)
    )
    with av.open(str(sound)) as source, av.open(str(path), "w") as target:
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        streams[source.streams.video[0].index].disposition = av.stream.Disposition.attached_pic
        for packet in source.demux():
            if packet.size:
                packet.stream = streams[packet.stream_index]
                target.mux(packet)
    with pytest.raises(MediaError, match="it has no video track"):
        read(path)


@pytest.fixture
def folder(tmp_path):
    """Ten numbered images."""
    for number in range(10):
        Image.fromarray(numbered_frame(number, 64, 48)).save(tmp_path / f"{number:04}.png")
    return tmp_path


def test_folder_of_images(folder):
    paths = tuple(sorted(folder.iterdir()))
    images = read_frames(Frames(paths, (0, 3, 3, 1), 4))
    assert images.dtype == torch.uint8
    assert images.shape == (4, 48, 64, 3)
    assert numbers(images) == [0, 9, 9, 3]
    assert np.array_equal(images[1].numpy(), numbered_frame(9, 64, 48))


@pytest.mark.parametrize(
    ("mode", "ending"), [("L", "jpg"), ("P", "png"), ("RGBA", "png"), ("LA", "png"), ("1", "png"), ("CMYK", "jpg")]
)
def test_images_become_rgb(mode, ending, folder):
    image = Image.fromarray(numbered_frame(5, 64, 48)).convert(mode)
    image.save(folder / f"x.{ending}")
    with Image.open(folder / f"x.{ending}") as stored:
        expected = np.asarray(stored.convert("RGB"))
    images = read_frames(Frames((folder / f"x.{ending}",), (0,), 1))
    assert np.array_equal(images[0].numpy(), expected)


def test_refused_images(folder):
    good = folder / "0001.png"
    data = good.read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    (folder / "zero.png").touch()
    (folder / "text.png").write_text("not an image")
    (folder / "folder.png").mkdir()
    Image.fromarray(np.zeros((48, 64), np.uint16)).save(folder / "deep.png")
    Image.fromarray(numbered_frame(0, 48, 64)).save(folder / "portrait.png")
    Image.fromarray(np.zeros((1, 8193, 3), np.uint8)).save(folder / "wide.png")
    # With its shorter side resized to 224 pixels, it would have 400 million.
    Image.fromarray(np.zeros((1, 8192, 3), np.uint8)).save(folder / "sliver.png")
    causes = {
        "cut.png": "it can not be read as an image: .*truncated",
        "zero.png": "it is empty",
        "text.png": "it is not an image",
        "folder.png": "it is a folder",
        "missing.png": "there is no such file",
        "deep.png": "its pixels have more than 8 bits",
        "portrait.png": "it is 48x64, but 0001.png of the same clip 64x48",
        "wide.png": "its frames are 8193x1; at most 8192",
        "sliver.png": "its frames are 8192x1; .*and 32 times the other side",
    }
    for name, cause in causes.items():
        with pytest.raises(MediaError, match=cause) as raised:
            read_frames(Frames((good, folder / name), (0, 1), 2))
        assert raised.value.path == str(folder / name)
        # What is not among the frames asked for is not opened.
        assert read_frames(Frames((good, folder / name), (0,), 2)).shape == (1, 48, 64, 3)


def test_an_image_whose_header_says_gigabytes(folder):
    """PIL asked for as much memory as a part's length says, and a MemoryError came of it."""
    good = folder / "0001.png"
    data = good.read_bytes()
    position = data.index(b"IDAT") - 4
    (folder / "part.png").write_bytes(data[:position] + struct.pack(">I", 0xFFFFFFF0) + data[position + 4 :])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 30), limits[1]))
    try:
        images = read_frames(Frames((good, folder / "part.png"), (0, 1), 2))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert torch.equal(images[0], images[1])
