#!/usr/bin/env bash
# datasets 5.2.0: a string in JSON Lines stays a string only while every other line agrees.
#
# Guessed: a field that holds strings in some lines and a list in another is either an error or read as it stands.
# Seen: one line with a list (or an object) makes the column `Json(decode=True)`, and then every string of that column
# that happens to be JSON is decoded as well: "007" becomes the number 7, "true" becomes True. Without that line the
# same "007" is a string. A column of strings that look like dates becomes datetimes in either case.
# So the labels and texts that a model is trained on depend on a line far away.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'datasets==5.2.0' 'pyarrow==26.0.1' 'pandas==3.1.1'
cd "$folder"
printf '{"text": "007"}\n{"text": "true"}\n{"text": "plain words"}\n' > plain.jsonl
printf '{"text": "007"}\n{"text": "true"}\n{"text": ["a", "list"]}\n' > mixed.jsonl
printf '{"day": "2024-01-02"}\n{"day": "2024-05-06"}\n' > days.jsonl
HF_HUB_OFFLINE=1 HF_HOME="$folder/hf" venv/bin/python - 2>/dev/null <<'PY'
import datetime
import datasets

def read(name):
    return list(datasets.load_dataset("json", data_files=name, split="train"))

plain, mixed, days = read("plain.jsonl"), read("mixed.jsonl"), read("days.jsonl")
print("datasets", datasets.__version__)
print("strings alone:     ", [row["text"] for row in plain])
print("a list among them: ", [row["text"] for row in mixed])
print("dates:             ", [row["day"] for row in days])
assert [row["text"] for row in plain] == ["007", "true", "plain words"]
assert [row["text"] for row in mixed] == [7, True, ["a", "list"]]
assert [row["day"] for row in days] == [datetime.datetime(2024, 1, 2), datetime.datetime(2024, 5, 6)]
PY
