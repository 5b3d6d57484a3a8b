"""Tests of tables: every format gives the same rows; errors for paths and columns name the existing ones."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import csv

from sdtrain.data import formats
from sdtrain.data.formats import TableError
from sdtrain.data.tables import Table, find_files, write_parquet

ROWS = pa.table(
    {
        "URL": [f"https://example.org/{i}.jpg" for i in range(5)],
        "TEXT": ["a cat", 'quoted "dog", with comma', "naïve café 猫", "", "last"],
        "WIDTH": [512, 640, None, 100, 7],
        "pwatermark": [0.1, 0.25, 0.5, None, 1.0],
    }
)
COLUMNS = {"url": "URL", "caption": "TEXT", "original_width": "WIDTH"}


def write(form, path, table=ROWS):
    if form == "parquet":
        pq.write_table(table, path)
    elif form == "jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist()))
    else:
        csv.write_csv(table, path, csv.WriteOptions(delimiter="\t" if form == "tsv" else ","))
    return path


def read_all(table: Table, columns: list[str] | None = None) -> pa.Table:
    return pa.concat_tables(batch for _, batch in table.batches(columns))


@pytest.mark.parametrize("form", ["parquet", "csv", "tsv", "jsonl"])
def test_every_format_gives_the_same_rows(form, tmp_path):
    table = Table(write(form, tmp_path / f"t.{form}"), COLUMNS)
    assert table.schema.names == ["url", "caption", "original_width", "pwatermark"]
    rows = read_all(table)
    expected = ROWS.rename_columns(table.schema.names).to_pylist()
    if form in ("csv", "tsv"):
        expected[3]["caption"] = None  # an empty cell
    assert rows.to_pylist() == expected
    assert read_all(table, ["caption"]).column_names == ["caption"]


def test_folder_and_glob_read_their_files_in_order(tmp_path):
    (tmp_path / "deep").mkdir()
    write("parquet", tmp_path / "a.parquet", ROWS.slice(0, 2))
    write("parquet", tmp_path / "deep" / "b.parquet", ROWS.slice(2))
    (tmp_path / "README.md").write_text("not a table")
    assert read_all(Table(tmp_path)).to_pylist() == ROWS.to_pylist()
    assert read_all(Table(f"{tmp_path}/*.parquet")).num_rows == 2


def test_batches_are_bounded(tmp_path):
    many = pa.table({"url": pa.array(range(200_000))})
    pq.write_table(many, tmp_path / "t.parquet")
    sizes = [batch.num_rows for _, batch in Table(tmp_path / "t.parquet").batches()]
    assert sum(sizes) == 200_000 and max(sizes) <= 65_536


def test_wrong_path_names_the_expected_forms(tmp_path):
    with pytest.raises(TableError, match=r"none: no table there; .*\.parquet"):
        find_files(tmp_path / "none")
    (tmp_path / "t.xls").write_text("")
    with pytest.raises(TableError, match="t.xls: unknown kind of table"):
        find_files(tmp_path / "t.xls")
    write("csv", tmp_path / "a.csv")
    write("parquet", tmp_path / "b.parquet")
    with pytest.raises(TableError, match="several formats"):
        Table(tmp_path)


def test_a_wrong_column_names_the_nearest(tmp_path):
    path = write("csv", tmp_path / "t.csv")
    with pytest.raises(TableError, match=r"columns.url: no column Url; did you mean URL\?"):
        Table(path, {"url": "Url"})
    with pytest.raises(TableError, match=r"no column caption; known here: url, TEXT"):
        Table(path, {"url": "URL"}).require(["url", "caption"])
    with pytest.raises(TableError, match="columns.TEXT: the table has a column of that name too"):
        Table(path, {"TEXT": "URL"})


def column(path, name="x"):
    """Return the values of a column and its type."""
    read = read_all(Table(path), [name])
    return read[name].to_pylist(), str(read.schema.field(name).type)


@pytest.mark.parametrize("where", ["path", "s3"])
@pytest.mark.parametrize("form", ["parquet", "csv", "tsv", "jsonl"])
def test_a_file_a_folder_a_glob_and_braces_here_and_on_s3(form, where, tmp_path, request):
    for number in range(3):
        write(form, tmp_path / f"{number}.{form}", ROWS.slice(number, 1))
    (tmp_path / "notes.txt").write_text("no table")
    root = str(tmp_path)
    if where == "s3":
        s3 = request.getfixturevalue("s3")
        for path in tmp_path.iterdir():
            s3.put(f"tables/{form}/{path.name}", path.read_bytes())
        root = s3.url(f"tables/{form}")
    expected = ROWS.slice(0, 3).to_pylist()
    for path in (root, f"{root}/*.{form}", f"{root}/{{0..2}}.{form}", [f"{root}/{i}.{form}" for i in range(3)]):
        table = Table(path)
        assert read_all(table).to_pylist() == expected, path
        assert read_all(table, ["TEXT"]).num_rows == 3
    one = Table(f"{root}/1.{form}")
    assert one.files == [f"{root}/1.{form}"] and read_all(one).to_pylist() == expected[1:2]
    assert one.count() == (1 if form == "parquet" else None)


def test_missing_s3_object_is_named(s3):
    for path in ("tables/none.csv", "tables/none/*.csv", "tables/none"):
        with pytest.raises(TableError, match=f"{s3.url(path)[:20]}.*no table there"):
            Table(s3.url(path))


def test_a_type_fits_every_value_of_a_long_file(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK", 1 << 16)
    n = 30_000
    late = {
        "ints": ["1"] * n + ["2"],
        "floats": ["1"] * n + ["0.5"],
        "texts": ["1"] * n + ["x"],
        "bits": ["0"] * n + ["true"],
        "flags": ["true"] * n + ["False"],
        "nulls": [""] * n + ["7"],
        "dates": ["2020-01-01"] * n + ["2020-01-02"],
        "spaces": [" 1"] * n + ["2 "],
        "none": [""] * (n + 1),
    }
    lines = [",".join(late), *(",".join(row) for row in zip(*late.values(), strict=True))]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    ends = {name: (values[0], values[-1], kind) for name in late for values, kind in [column(tmp_path / "t.csv", name)]}
    assert ends == {
        "ints": (1, 2, "int64"),
        "floats": (1.0, 0.5, "double"),
        "texts": ("1", "x", "string"),
        "bits": ("0", "true", "string"),
        "flags": (True, False, "bool"),
        "nulls": (None, 7, "int64"),
        "dates": ("2020-01-01", "2020-01-02", "string"),
        "spaces": (1, 2, "int64"),
        "none": (None, None, "null"),
    }


def test_a_type_fits_every_value_of_long_json_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK", 1 << 16)
    rows = [{"int": 1, "float": 1, "null": None, "date": "2020-01-01"}] * 10_000
    rows += [{"int": 2, "float": 0.5, "null": "x", "date": "2020-01-02", "late": [1, 2]}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert column(tmp_path / "t.jsonl", "float")[0][-2:] == [1.0, 0.5]
    assert column(tmp_path / "t.jsonl", "int") == ([1] * 10_000 + [2], "int64")
    assert column(tmp_path / "t.jsonl", "null")[0][-2:] == [None, "x"]
    assert column(tmp_path / "t.jsonl", "date")[1] == "string"
    assert column(tmp_path / "t.jsonl", "late")[0][-2:] == [None, [1, 2]]


def test_a_column_has_one_type_in_all_files(tmp_path):
    pq.write_table(pa.table({"x": pa.array([1], pa.int32())}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"x": [0.5], "y": ["late"]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"x": pa.array([None], pa.null())}), tmp_path / "c.parquet")
    assert column(tmp_path) == ([1.0, 0.5, None], "double")
    assert column(tmp_path, "y")[0] == [None, "late", None]
    pq.write_table(pa.table({"y": pa.array(["a"]).dictionary_encode()}), tmp_path / "d.parquet")
    assert column(tmp_path, "y") == ([None, "late", None, "a"], "string")
    pq.write_table(pa.table({"x": ["text"]}), tmp_path / "e.parquet")
    with pytest.raises(TableError, match=r"e.parquet: cannot read the table: .*x.*string"):
        Table(tmp_path)


def test_csv_files_may_order_and_type_their_columns_differently(tmp_path):
    (tmp_path / "a.csv").write_text("url,x\nu,1\n")
    (tmp_path / "b.csv").write_text("x,url,more\nseven,v,true\n")
    read = read_all(Table(tmp_path))
    assert read.to_pylist() == [{"url": "u", "x": "1", "more": None}, {"url": "v", "x": "seven", "more": True}]


@pytest.mark.parametrize("form, sign", [("csv", ","), ("tsv", "\t")])
def test_an_empty_cell_is_null_in_every_column(tmp_path, form, sign):
    lines = ["url,caption,license,score,none", "u,c,by,1.5,", ",,,,", 'v,"","",2,', "w,NULL,NA,3,"]
    (tmp_path / f"t.{form}").write_text("".join(line.replace(",", sign) + "\n" for line in lines))
    rows = read_all(Table(tmp_path))
    assert [list(row.values()) for row in rows.to_pylist()] == [
        ["u", "c", "by", 1.5, None],
        [None] * 5,
        ["v", None, None, 2.0, None],
        ["w", "NULL", "NA", 3.0, None],
    ]


def test_texts_of_csv_keep_their_spelling(tmp_path):
    (tmp_path / "t.csv").write_text("URL,caption,id,padded,score,more\n1,1.50,007,-00.5,1.50,2.50\n2,true,8,1,0.5,1\n")
    table = Table(tmp_path / "t.csv", {"url": "URL"}, texts=["more"])
    assert read_all(table).to_pylist() == [
        {"url": "1", "caption": "1.50", "id": "007", "padded": "-00.5", "score": 1.5, "more": "2.50"},
        {"url": "2", "caption": "true", "id": "8", "padded": "1", "score": 0.5, "more": "1"},
    ]
    (tmp_path / "none.csv").write_text("url,caption\nu,\n")
    assert pa.types.is_string(Table(tmp_path / "none.csv").schema.field("caption").type)


def test_csv_oddities_are_read(tmp_path):
    (tmp_path / "t.csv").write_bytes(
        b'\xef\xbb\xbfurl,caption\r\na,"two\r\nlines, and ""quotes"""\r\nb,NULL\r\n\r\nc,\xe7\x8c\xab\r\n'
    )
    rows = read_all(Table(tmp_path / "t.csv")).to_pylist()
    captions = ['two\r\nlines, and "quotes"', "NULL", "猫"]
    assert rows == [{"url": u, "caption": c} for u, c in zip("abc", captions, strict=True)]


@given(
    st.lists(st.one_of(st.none(), st.integers(-(2**62), 2**62), st.floats(allow_nan=False), st.booleans()), min_size=1)
)
def test_csv_values_are_read_back_with_their_type(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    texts = ["" if v is None else str(v) for v in values]
    path.write_text("".join(f"{line}\n" for line in ["url,x", *(f"u,{text}" for text in texts)]))
    found, kind = column(path)
    types = {type(v) for v in values if v is not None}
    if types == {int} or types == {bool}:
        assert found == values and kind in ("int64", "bool")
    elif types and types <= {int, float}:
        assert found == [None if v is None else float(v) for v in values] and kind == "double"
    elif types:
        assert found == [text or None for text in texts] and kind == "string"  # numbers mixed with booleans


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.csv", b"url,caption\na,b\nc\n", "Expected 2 columns, got 1"),
        ("t.csv", b"url,caption\na,b\nc,d,e\n", "Expected 2 columns, got 3"),
        ("t.csv", b"", "Empty CSV"),
        ("t.csv", "url,caption\na,café\n".encode("latin-1"), "write it in UTF-8"),
        ("t.csv", "url,caption\na,b\n".encode("utf-16"), "cannot read the table"),
        ("t.csv", b"url,url\na,b\n", "two columns are called 'url'"),
        ("t.jsonl", b'{"url": "a"}\n{"url": ', "cannot read the table"),
        ("t.jsonl", b'{"x": 1}\n{"x": "text"}\n', "changed from number to string"),
        ("t.parquet", b"PAR1 and no more", "cannot read the table"),
    ],
)
def test_damaged_tables_are_refused_by_name(tmp_path, name, content, message):
    write("csv" if name == "t.csv" else name.partition(".")[2], tmp_path / f"a{name}")  # beside a valid table
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TableError, match=message) as error:
        list(Table(tmp_path).batches())
    assert str(error.value).startswith(f"{tmp_path}/{name}: ") and "\n" not in str(error.value)


def test_a_damaged_page_is_found_when_it_is_read(tmp_path):
    for name in "ab":
        pq.write_table(pa.table({"url": [str(i) * 9 for i in range(5000)]}), tmp_path / f"{name}.parquet")
    data = bytearray((tmp_path / "b.parquet").read_bytes())
    data[100:2000] = bytes(1900)
    (tmp_path / "b.parquet").write_bytes(data)
    with pytest.raises(TableError, match=r"b.parquet: cannot read the table"):
        list(Table(tmp_path).batches())


def test_parquet_file_is_written_atomically(tmp_path):
    path = tmp_path / "new" / "t.parquet"
    with write_parquet(path, ROWS.schema) as file:
        file.write(ROWS.slice(0, 3))
        file.write(ROWS.slice(3))
        assert not path.exists()
    assert file.rows == 5 and pq.read_table(path).equals(ROWS)
    with pytest.raises(RuntimeError):
        with write_parquet(path, ROWS.schema) as file:
            file.write(ROWS.slice(0, 1))
            raise RuntimeError
    assert pq.read_table(path).num_rows == 5
    assert [p.name for p in path.parent.iterdir()] == ["t.parquet"]


def test_bytes_of_a_parquet_file_depend_only_on_its_rows(tmp_path):
    many = pa.table({"x": range(150_000)})
    for name, size in (("a", 150_000), ("b", 1000), ("c", 65_537)):
        with write_parquet(tmp_path / name, many.schema) as file:
            for begin in range(0, 150_000, size):
                file.write(many.slice(begin, size))
    assert len({(tmp_path / name).read_bytes() for name in "abc"}) == 1
    assert pq.read_table(tmp_path / "a").equals(many)


def test_a_file_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(pa.ArrowInvalid), write_parquet(tmp_path / "t", pa.schema([("x", pa.int8())])) as file:
        file.write(pa.table({"x": [1000]}))
    assert not list(tmp_path.iterdir())


def test_parquet_tells_which_columns_have_no_null(tmp_path):
    for number, last in enumerate(("z", None)):
        table = pa.table({"url": ["a", "b", "c"], "caption": ["x", "y", last]})
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=2)
    csv.write_csv(pa.table({"url": ["a"]}), tmp_path / "t.csv")
    both = Table(tmp_path / "*.parquet", {"address": "url"})
    assert both.is_full("address") and not both.is_full("caption")
    assert Table(tmp_path / "0.parquet").is_full("caption") and not Table(tmp_path / "t.csv").is_full("url")
