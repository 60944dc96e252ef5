"""Parameter counts: exact integers, and agreement with the paper where there is any."""

import pytest

import stgcma_fast as sf
from stgcma_fast import params

EXACT = {
    ("clip_b16", "tiny"): (3_529_973, 89_562_101),
    ("clip_b16", "base"): (11_497_781, 97_529_909),
    ("clip_l14", "tiny"): (10_675_789, 314_119_757),
    ("clip_l14", "base"): (20_117_581, 323_561_549),
    ("swin_b", "tiny"): (5_599_957, 92_345_613),
    ("swin_b", "base"): (10_068_597, 96_814_253),
    ("swin_l", "tiny"): (11_740_697, 206_739_821),
    ("swin_l", "base"): (19_026_857, 214_025_981),
}


@pytest.mark.parametrize(("arch", "adapters"), EXACT)
def test_presets(arch, adapters):
    assert params.count(sf.preset(arch, adapters)) == EXACT[arch, adapters]


def test_table2():
    rows = params.table2()
    assert {row.name for row in rows if not row.agrees} == {"tiny ViT-L/14", "base ViT-B/16, Table 1", "base Swin-B, Table 1"}
    assert all(row.note for row in rows if not row.agrees)
    assert {(row.trainable, row.total) for row in rows} == {*EXACT.values(), (6_185_909, 92_218_037), (8_839_477, 95_585_133)}


def test_table5():
    rows = {row.name: row for row in params.table5()}
    assert {name for name, row in rows.items() if not row.agrees} == {"full fine-tuning, shared"}
    assert (rows["audio only"].trainable, rows["audio only"].total) == (9_569_869, 313_013_837)
    assert rows["visual only"][1:3] == rows["audio only"][1:3]
    for name in ("two streams, audio adapters", "two streams, visual adapters"):
        assert rows[name].trainable == 10_602_061
    for name in ("no interaction", "audio to visual", "visual to audio", "both directions"):
        assert (rows[name].trainable, rows[name].total) == EXACT["clip_l14", "base"]
    assert rows["full fine-tuning, shared"].total == 304_530_509
    assert rows["full fine-tuning, two towers"].total == 606_839_885


def test_table3():
    rows = {row.name: row for row in params.table3()}
    assert {name: (row.trainable, row.total) for name, row in rows.items()} == {
        "base Swin-B": (29_739_753, 116_485_409),
        "base Swin-B, Table 1": (28_510_633, 115_256_289),
        "base Swin-L": (38_601_925, 233_601_049),
    }
    assert {name for name, row in rows.items() if not row.agrees} == {"base Swin-B, Table 1"}
    assert rows["base Swin-B, Table 1"].note


def test_table4():
    rows = {row.name: row for row in params.table4()}
    assert {name: (row.trainable, row.total) for name, row in rows.items()} == {
        "STG-CMA-L, dgsct1536": (83_127_864, 278_126_988),
        "STG-CMA-B, shipped512_128": (26_339_000, 221_338_124),
        "STG-CMA-B, lavish512": (26_863_160, 221_862_284),
    }
    assert {name for name, row in rows.items() if not row.agrees} == {"STG-CMA-B, shipped512_128"}
    assert rows["STG-CMA-B, shipped512_128"].note


def test_table7():
    """The head, tables and gates; 3,485,568 a temporal set, 6,971,136 a spatial or a global one; they add up."""
    rows = params.table7()
    assert len(rows) == 8
    assert all(row.agrees for row in rows)
    for row in rows:
        temporal, spatial, global_ = map(int, row.name.split())
        assert row.trainable == 21_174_085 + 3_485_568 * temporal + 6_971_136 * (spatial + global_)


def test_main_prints_every_row(capsys):
    assert params.main() == 0
    out = capsys.readouterr().out
    for table in (params.table2, params.table3, params.table4, params.table5, params.table7):
        for row in table():
            assert f"{row.trainable:,}" in out
    assert "misprint" in out
