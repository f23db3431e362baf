"""Writes data_splits.json: into which splits the `datasets` package sorts files by their names.

Run with datasets 5.2.0: python make_data_splits.py
"""

import json
import os
import pathlib
import tempfile

import datasets
from datasets.data_files import DataFilesDict, get_data_patterns

LAYOUTS = [
    ["train.jsonl", "test.jsonl"],
    ["my_dev.csv", "other.csv"],
    ["data/train-00000-of-00002.parquet", "data/train_sft-00000-of-00002.parquet"],
    ["data/train_sft-00000-of-00002.parquet", "data/test_sft-00000-of-00001.parquet"],
    ["plain-text/test-00000-of-00001.parquet", "plain-text/train-00000-of-00001.parquet"],
    ["test/part-1.json", "train/part-1.json"],
    ["en/val/a.txt", "en/b.txt"],
    ["trainer.txt"],
    ["part-00000-of-00010.parquet"],
    ["data/part-00000-of-00002.parquet"],
    ["train.csv", "test.csv", "notes.txt"],
    ["a.jsonl", "b.jsonl", "README.md", "dataset_infos.json", ".hidden.jsonl"],
    ["train/test_words.csv", "train/x.csv"],
    ["eval.jsonl", "training.jsonl"],
    ["my-train-data.csv", "train2.csv"],
    ["latest.csv", "contest.csv"],
    ["train.jsonl", "valid.jsonl", "test.jsonl"],
    ["Train.csv", "TEST.csv"],
    ["deep/er/train_en.jsonl.gz", "deep/er/test_en.jsonl.gz"],
]


def sort(files):
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            path = pathlib.Path(folder, file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x")
        found = DataFilesDict.from_patterns(get_data_patterns(folder), base_path=folder)
        return {
            str(split): sorted(os.path.relpath(path, folder) for path in paths)
            for split, paths in found.items()
        }


if __name__ == "__main__":
    cases = [{"files": files, "splits": sort(files)} for files in LAYOUTS]
    result = {"datasets": datasets.__version__, "cases": cases}
    pathlib.Path(__file__).with_name("data_splits.json").write_text(json.dumps(result, indent=1) + "\n")
