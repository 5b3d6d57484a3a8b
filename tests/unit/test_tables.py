"""Tables of every format give the same rows under our names; wrong paths and columns say what is there."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from sdtrain.tables import ParquetFile, Table, TableError, find_files

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


@pytest.mark.parametrize("form", ["parquet", "csv", "tsv", "jsonl"])
def test_every_format_reads_alike(form, tmp_path):
    table = Table(write(form, tmp_path / f"t.{form}"), COLUMNS)
    assert table.schema.names == ["url", "caption", "original_width", "pwatermark"]
    rows = pa.concat_tables(table.batches())
    assert rows.to_pylist() == ROWS.rename_columns(table.schema.names).to_pylist()
    assert pa.concat_tables(table.batches(["caption"])).column_names == ["caption"]


def test_folder_and_glob_read_their_files_in_order(tmp_path):
    (tmp_path / "deep").mkdir()
    write("parquet", tmp_path / "a.parquet", ROWS.slice(0, 2))
    write("parquet", tmp_path / "deep" / "b.parquet", ROWS.slice(2))
    (tmp_path / "README.md").write_text("not a table")
    assert pa.concat_tables(Table(tmp_path).batches()).to_pylist() == ROWS.to_pylist()
    assert pa.concat_tables(Table(f"{tmp_path}/*.parquet").batches()).num_rows == 2


def test_batches_are_bounded(tmp_path):
    many = pa.table({"url": pa.array(range(200_000))})
    pq.write_table(many, tmp_path / "t.parquet")
    sizes = [batch.num_rows for batch in Table(tmp_path / "t.parquet").batches()]
    assert sum(sizes) == 200_000 and max(sizes) <= 65_536


def test_a_wrong_path_says_what_is_expected(tmp_path):
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
    with pytest.raises(TableError, match=r"no column caption; columns here: url, TEXT"):
        Table(path, {"url": "URL"}).require(["url", "caption"])
    with pytest.raises(TableError, match="columns.TEXT: the table has a column of that name too"):
        Table(path, {"TEXT": "URL"})


def test_damaged_tables_are_refused(tmp_path):
    path = write("parquet", tmp_path / "t.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(TableError, match="t.parquet: cannot read the table"):
        Table(path)
    (tmp_path / "t.jsonl").write_text('{"url": "a"}\n{"url": ')
    with pytest.raises(TableError, match="t.jsonl: cannot read the table"):
        list(Table(tmp_path / "t.jsonl").batches())
    ragged = tmp_path / "t.csv"
    ragged.write_text("url,caption\na,b\nc\n")
    with pytest.raises(TableError, match="t.csv: cannot read the table"):
        list(Table(ragged).batches())


def test_a_parquet_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "t.parquet"
    with ParquetFile(path, ROWS.schema) as file:
        file.write(ROWS.slice(0, 3))
        file.write(ROWS.slice(3))
        assert not path.exists()
    assert file.rows == 5 and pq.read_table(path).equals(ROWS)
    with pytest.raises(RuntimeError):
        with ParquetFile(path, ROWS.schema) as file:
            file.write(ROWS.slice(0, 1))
            raise RuntimeError
    assert pq.read_table(path).num_rows == 5
    assert [p.name for p in path.parent.iterdir()] == ["t.parquet"]
