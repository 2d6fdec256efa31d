"""data.py against plain dicts and loops, planted faults, processes that race and die, and real files where
they stand."""
import argparse
import bz2
import gzip
import json
import lzma
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile

import numpy as np
import pytest

import data
from conftest import ROOT, run
from data import Corpus, TrainingRows, open_bytes, read_lines, read_queries, write_whole

NASTY = ["", " ", "a\tb\t", "\u2028 line \u0085 separators \x0b\x0c\x1c", "lone \r in the middle",
         'quotes " and \\ back', "héllo ünï", "\U0001f600 astral", "x" * 5000, "\t", "\ufeff"]


def tsv(path, rows, end="\n"):
    path.write_bytes("".join(f"{docid}\t{text}{end}" for docid, text in rows).encode())
    return path


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def small_corpus(folder, n=50):
    return Corpus(tsv(folder / "collection.tsv", [(f"p{i}", f"passage {i}") for i in range(n)]))


# Readers

def test_lines_end_at_newline_only(tmp_path):
    text = "1\ta\u2028b\x0bc\r\n\n2\td\re\n3\tlast"
    forms = {"a": text.encode(), "b.gz": gzip.compress(text.encode()), "c": b"\xef\xbb\xbf" + text.encode(),
             "gz, but not by name": gzip.compress(text.encode())}
    for name, blob in forms.items():
        (tmp_path / name).write_bytes(blob)
        lines = [(1, "1\ta\u2028b\x0bc"), (3, "2\td\re"), (4, "3\tlast")]
        assert list(read_lines(tmp_path / name)) == lines, name
        with open_bytes(tmp_path / name) as file:
            assert file.read() == text.encode()


def test_queries_in_every_form(tmp_path):
    want = {"1": "what is\ta tab", "q-2": "zwei", "3": ""}
    tsv(tmp_path / "q.tsv", want.items(), end="\r\n")
    (tmp_path / "q.tsv.gz").write_bytes(gzip.compress((tmp_path / "q.tsv").read_bytes()))
    jsonl(tmp_path / "queries.jsonl",
          [{"_id": qid, "text": text, "metadata": {}} for qid, text in want.items()])
    for path in (tmp_path / "q.tsv", tmp_path / "q.tsv.gz", tmp_path / "queries.jsonl", tmp_path):
        assert read_queries(path) == want


@pytest.mark.parametrize("blob, says", [
    (b"1\ta\n17\n", r"q:2: expected id<TAB>text, got 1 column"),
    (b"1\ta\n2\tb\n1\tc\n", r"q:3: .*'1' stands on line 1 already"),
    (b"1\ta\n2\tcaf\xe9\n", r"q:2: not UTF-8 .* iconv"),
    (b"\ta\n", r"q:1: '' cannot be an id"),
    (b"a b\tc\n", r"q:1: 'a b' cannot be an id"),
    (b"", r"q: holds no queries"),
    (b'{"_id": "1", "text": "a"}\n{"_id": "2", "text"\n', r"q:2: not JSON .* at column"),
    (b'{"key": "1", "text": "a"}\n',
     r"q:1: expected an id under one of _id, id, .*, got None; the keys are key, text"),
    (b'{"_id": true, "text": "a"}\n', r"q:1: expected an id under one of .*, got True"),
    (b'{"_id": "1", "body": "a"}\n', r"q:1: expected a string under one of text, contents"),
    (b'{"_id": "1", "text": 5}\n', r"q:1: expected a string under one of text"),
    (b'{"_id": "1", "text": "a"}\n[1]\n', r"q:2: expected a JSON object, got list"),
    (gzip.compress(b"1\ta\n", mtime=0)[:-9], r"q: the gzip data end early"),
])
def test_faults_in_queries_and_corpus_name_their_line(tmp_path, blob, says):
    (tmp_path / "q").write_bytes(blob)
    with pytest.raises(ValueError, match=says):
        read_queries(tmp_path / "q")
    with pytest.raises(ValueError, match=says.replace("queries", "passages").replace("query", "passage")):
        Corpus(tmp_path / "q")
    assert os.listdir(tmp_path) == ["q"]  # nothing half-made stays


def test_queries_and_passages_under_other_keys(tmp_path):
    """Anserini's and Pyserini's, Tevatron's corpus and queries, and the plain ones."""
    for record, text in (
        ({"id": "7", "contents": "a\nb"}, "a\nb"),
        ({"docid": "7", "title": "T", "text": "x"}, "T x"),
        ({"query_id": "7", "query": "what"}, "what"),
        ({"id": 7, "text": "x"}, "x"),
        ({"qid": "7", "query": "x"}, "x"),
    ):
        jsonl(tmp_path / "f.jsonl", [record])
        assert read_queries(tmp_path / "f.jsonl") == {"7": text}
        corpus = Corpus(tmp_path / "f.jsonl")
        assert (corpus.docid(0), corpus[0]) == ("7", text)


def packed(folder, how):
    """What a user might have downloaded, made by the programs that make it."""
    source = folder / "collection.tsv"
    source.write_text("1\ta passage\n")
    if how == "parquet":
        made = folder / "collection.parquet"
        # As pyarrow begins one.
        made.write_bytes(bytes.fromhex("5041523115041510151c4c1502150000") + bytes(40) + b"PAR1")
    elif how == "zip":
        made = folder / "collection.zip"
        with zipfile.ZipFile(made, "w") as archive:
            archive.write(source, source.name)
    elif how in ("tar", "tar.gz"):
        made = folder / f"collection.{how}"
        with tarfile.open(made, "w:gz" if how == "tar.gz" else "w") as archive:
            archive.add(source, source.name)
    else:
        made = folder / f"collection.{how}"
        made.write_bytes({"bz2": bz2.compress, "xz": lzma.compress}[how](source.read_bytes()))
    source.unlink()
    return made


@pytest.mark.parametrize("how, command", [("zip", "unzip"), ("bz2", "bunzip2"), ("xz", "unxz"),
                                          ("tar", "tar -xf"), ("tar.gz", "tar -xf"),
                                          ("parquet", "pandas.read_parquet")])
def test_binary_files_say_what_unpacks_them(tmp_path, how, command):
    path = packed(tmp_path, how)
    for reader in (read_queries, Corpus, TrainingRows, data.read_json):
        with pytest.raises(
            ValueError, match=f"{path.name}: is a .*, and text is expected; .*{command}.*{path}"
        ):
            reader(path)
    if shutil.which(command.split()[0]):  # the command that is printed works
        subprocess.run([*command.split(), path.name], cwd=tmp_path, check=True)
        assert [f.read_text() for f in tmp_path.iterdir() if f != path] == ["1\ta passage\n"]


def test_missing_files_and_folders_are_said_in_words(tmp_path):
    for reader in (read_queries, Corpus, TrainingRows):
        with pytest.raises(ValueError, match="nowhere: no such file"):
            reader(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds none of corpus.jsonl"):
        Corpus(tmp_path)
    with pytest.raises(ValueError, match="is a folder"):
        TrainingRows(tmp_path)


def test_write_whole_leaves_all_or_nothing(tmp_path):
    path = tmp_path / "deep" / "file"
    with write_whole(path) as file:
        file.write("old")
    with pytest.raises(RuntimeError), write_whole(path) as file:
        file.write("new, but")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(path.parent) == ["file"]


def test_devices_pipes_and_links_stay_what_they_are(tmp_path):
    """A rename put a file in the place of /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE)
    with write_whole(tmp_path / "pipe") as file:
        file.write("through")
    assert reader.communicate()[0] == b"through" and (tmp_path / "pipe").is_fifo()
    with write_whole("/dev/null") as file:
        file.write("x")
    assert not os.path.isfile("/dev/null")
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with write_whole(tmp_path / "link") as file:
        file.write("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"
    with pytest.raises(OSError, match="Is a directory"), write_whole(tmp_path):
        pass


def test_what_comes_through_a_pipe(tmp_path):
    """Opened twice, a pipe lost what the first look had read."""
    queries = {f"q{i}": f"query {i}" for i in range(3000)}
    path = tsv(tmp_path / "q.tsv", queries.items())
    count = "import data, sys; print(len(data.read_queries(sys.argv[1])))"
    script = f'{sys.executable} -c "{count}" <(cat {path})'
    assert subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True).stdout == "3000\n"
    os.mkfifo(tmp_path / "pipe.tsv")
    with pytest.raises(ValueError, match="is a pipe, and is read more than once; write it to a file first"):
        Corpus(tmp_path / "pipe.tsv")


def test_a_slash_at_the_end_of_a_folder(tmp_path):
    """`out/` is `out`: its lock and its partial folder stand beside it, not in it."""
    with data.locked(f"{tmp_path}/out/"), data.new_folder(f"{tmp_path}/out/") as folder:
        (folder / "file").touch()
        assert not (tmp_path / "out").exists()
    data.discard(f"{tmp_path}/out/")
    assert os.listdir(tmp_path) == []


def test_new_folder_and_discard(tmp_path):
    place = tmp_path / "deep" / "place"
    (tmp_path / "deep" / "place.partial").mkdir(parents=True)  # of a process that was killed
    (tmp_path / "deep" / "place.partial" / "old").touch()
    with pytest.raises(RuntimeError), data.new_folder(place) as folder:
        (folder / "file").touch()
        raise RuntimeError
    assert os.listdir(place.parent) == []
    with data.new_folder(place) as folder:
        (folder / "file").touch()
        assert not place.exists()
    assert os.listdir(place) == ["file"] and os.listdir(place.parent) == ["place"]
    with pytest.raises(ValueError, match="place exists; remove it or choose another --out"):
        with data.new_folder(place):
            pass
    (tmp_path / "deep" / "place.partial").mkdir()  # of a process that was killed while it discarded
    data.discard(place)
    assert os.listdir(place.parent) == []


def test_discard_renames_before_it_removes(tmp_path, monkeypatch):
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "file").touch()
    remove, calls = data.shutil.rmtree, []

    def die(folder, **kw):
        calls.append(folder)
        if len(calls) == 2:
            raise KeyboardInterrupt  # killed with the files still there
        remove(folder, **kw)
    monkeypatch.setattr(data.shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        data.discard(tmp_path / "place")
    assert os.listdir(tmp_path) == ["place.partial"]


def test_a_full_disk_names_the_file(tmp_path):
    """/dev/full is a disk without room. A file aside of it cannot be, so the write itself is played."""
    with pytest.raises(OSError, match=r"No space left on device: '.*/out.tsv'"):
        with write_whole(tmp_path / "out.tsv"), open("/dev/full", "w") as full:
            full.write("x")
    assert os.listdir(tmp_path) == []


def hold(place, queue):
    with data.locked(place):
        queue.put(os.getpid())
        time.sleep(60)


def test_two_writers_exclude_each_other(tmp_path):
    place, context = tmp_path / "deep" / "out.jsonl", multiprocessing.get_context("fork")
    queue = context.Queue()
    holder = context.Process(target=hold, args=(place, queue))
    holder.start()
    pid = queue.get(timeout=30)
    says = f"out.jsonl: process {pid} is writing there; .*kill {pid}.*choose another --out"
    with pytest.raises(ValueError, match=says), data.locked(place):
        pass
    os.kill(pid, signal.SIGKILL)
    holder.join()
    with data.locked(place):  # the kernel freed it
        with pytest.raises(ValueError, match=f"process {os.getpid()} is writing"), data.locked(place):
            pass
    assert os.listdir(place.parent) == []  # and nothing is left


def add_one(place):
    for _ in range(200):
        with data.locked(place, wait=True):
            n = int(place.read_text())
            place.write_text(str(n + 1))


def test_those_who_wait_come_one_at_a_time(tmp_path):
    """The lock's file is removed after use: who waited for a removed one must not believe that it holds
    anything."""
    place, context = tmp_path / "n", multiprocessing.get_context("fork")
    place.write_text("0")
    workers = [context.Process(target=add_one, args=(place,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert place.read_text() == "800" and os.listdir(tmp_path) == ["n"]


def test_files_are_known_by_their_checksum(tmp_path):
    (tmp_path / "a").write_bytes(b"123456789")
    assert data.checksum(tmp_path / "a") == [9, 0xCBF43926]  # the check value in the definition of CRC-32
    stamps = {"a": data.stamp(tmp_path / "a")}
    data.check_files(tmp_path, stamps, "x", full=True)
    os.utime(tmp_path / "a", ns=(0, 0))
    data.check_files(tmp_path, stamps, "x")  # another time, the same bytes: a copy
    (tmp_path / "a").write_bytes(b"123456780")
    with pytest.raises(ValueError, match="a: altered since it was written .*; build it again"):
        data.check_files(tmp_path, stamps, "build it again")
    os.utime(tmp_path / "a", ns=(0, stamps["a"][1]))
    data.check_files(tmp_path, stamps, "x")  # damage under the same time: only a full look finds it
    with pytest.raises(ValueError, match="a: altered"):
        data.check_files(tmp_path, stamps, "x", full=True)
    (tmp_path / "a").write_bytes(b"1")
    with pytest.raises(ValueError, match="a: 1 bytes, and 9 were written; cure"):
        data.check_files(tmp_path, stamps, "cure")
    (tmp_path / "a").unlink()
    with pytest.raises(ValueError, match="a: missing; cure"):
        data.check_files(tmp_path, stamps, "cure")


def test_fingerprints(tmp_path):
    file = tmp_path / "f"
    with open(file, "wb") as out:
        out.truncate(200 << 20)  # sparse: 200 MB that take no room
    seen = {data.fingerprint(file)}
    for place in (0, (200 << 20) - 1, 100 << 20):  # first, last, and one that is within the 64 blocks or not
        with open(file, "r+b") as out:
            out.seek(place)
            out.write(b"x")
        seen.add(data.fingerprint(file))
    assert len(seen) >= 3
    small = tmp_path / "small"
    small.write_bytes(bytes(3 << 20))
    first = data.fingerprint(small)
    for place in (0, 1 << 20, (2 << 20) + 12345, (3 << 20) - 1):  # up to 64 MB every byte counts
        changed = bytearray(3 << 20)
        changed[place] = 1
        small.write_bytes(changed)
        assert data.fingerprint(small) != first
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.safetensors").write_bytes(b"weights")
        (tmp_path / folder / "config.json").write_text("{}")
    (tmp_path / "two" / "corpus.jsonl.store").write_text("a cache is no part of it")
    assert data.fingerprint(tmp_path / "one") == data.fingerprint(tmp_path / "two") != first
    (tmp_path / "two" / "config.json").write_text("[]")
    assert data.fingerprint(tmp_path / "one") != data.fingerprint(tmp_path / "two")
    (tmp_path / "two" / "config.json").rename(tmp_path / "two" / "other.json")
    assert data.fingerprint("meta-llama/Llama-3.2-1B") == "meta-llama/Llama-3.2-1B"


def test_read_json(tmp_path):
    (tmp_path / "a.json").write_bytes(gzip.compress(b'{"a": 1}'))
    assert data.read_json(tmp_path / "a.json") == {"a": 1}
    for blob in (b"", b'{"a": ', b"\xff\xfe"):
        (tmp_path / "b.json").write_bytes(blob)
        with pytest.raises(ValueError, match="b.json: is not JSON, or damaged .*; build it again"):
            data.read_json(tmp_path / "b.json", "build it again")


def test_a_process_leaves_when_its_launcher_is_killed(tmp_path):
    """A launcher starts a rank that would sleep for a minute; killed, it takes the rank with it."""
    rank = "import data, os, time; data.leave_with_parent(); print(os.getpid(), flush=True); time.sleep(60)"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "1"}
    started = subprocess.Popen([sys.executable, "-c", launcher], cwd=ROOT, env=env, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    pid = int(started.stdout.readline())
    started.kill()
    assert b"launcher of this process is gone" in started.stderr.readline()
    for _ in range(100):
        if not os.path.exists(f"/proc/{pid}") or "Z" in open(f"/proc/{pid}/stat").read().split(") ")[1][:1]:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the rank is still there")


def test_rank_and_world(monkeypatch):
    monkeypatch.delenv("RANK", raising=False), monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert data.rank_and_world() == (0, 1)
    monkeypatch.setenv("RANK", "3"), monkeypatch.setenv("WORLD_SIZE", "4")
    assert data.rank_and_world() == (3, 4)


def test_printable_leaves_no_command_to_the_terminal():
    assert data.printable("\x1b]0;title\x07\x9b31m\r\b\u202e") == r"\x1b]0;title\x07\x9b31m\r\x08\u202e"
    for text in ("h\u00e9llo w\u00f6rld", "\u65e5\u672c\u8a9e", "\U0001f468\u200d\U0001f33e",
                 "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"):
        assert data.printable(text) == text
    data.printable("".join(map(chr, range(0x110000)))).encode()  # halves of surrogate pairs, too


@pytest.mark.parametrize("kind, good, bad", [
    (data.positive_int, ["1", "12"], ["0", "-1", "1.5", "x", "", "inf"]),
    (data.natural, ["0", "7"], ["-1", "0.5", "nan"]),
    (data.positive, ["1e-9", "3"], ["0", "-1", "nan", "inf", "x"]),
    (data.non_negative, ["0", "3.5"], ["-1e-9", "nan", "inf"]),
    (data.finite, ["-3", "0", "1e300"], ["nan", "inf", "-inf", "1e999"]),
    (data.share, ["0", "1", "0.5"], ["-0.1", "1.1", "nan"]),
])
def test_numbers_on_the_command_line(kind, good, bad, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=kind)
    assert [parser.parse_args([f"--n={text}"]).n for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises(SystemExit):
            parser.parse_args([f"--n={text}"])
        assert "argument --n: expected a" in (said := capsys.readouterr().err) and f"got {text!r}" in said


def test_run_command_turns_faults_into_one_line(tmp_path):
    def outcome(body):
        program = f"import data, json\ndef call():\n {body}\ndata.run_command('tool', call)"
        done = run("-c", program, check=False)
        return done.returncode, done.stderr

    assert outcome("raise ValueError('say it')") == (1, "tool: say it\n")
    assert outcome("open('/no/where')") == (1, "tool: /no/where: No such file or directory\n")
    assert outcome("json.loads('{')")[0] == 1 and "Traceback" not in outcome("json.loads('{')")[1]
    assert outcome("raise KeyboardInterrupt") == (130, "\ntool: interrupted\n")
    assert outcome("raise BrokenPipeError") == (141, "")
    assert outcome("with data.write_whole('/dev/full/x'): pass")[0] == 1
    assert "Traceback" in outcome("raise KeyError('a bug is no fault of the user')")[1]
    assert outcome("pass") == (0, "")
    program = "import data; data.run_command('tool', lambda: print('x\\n' * 100000))"
    script = f'{sys.executable} -c "{program}" | head -1'
    done = subprocess.run(script, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("x\n", "")


# Corpus

@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("form", ["tsv", "tsv crlf", "tsv.gz", "jsonl", "jsonl.gz"])
def test_corpus_equals_a_dict(tmp_path, form, seed):
    """Random nasty passages."""
    rng = random.Random(seed)
    ids = [rng.choice(["", "é", "doc-", "<a:B_(c)>"]) + str(rng.randrange(10 ** rng.randrange(1, 9)))
           for _ in range(60)]
    ids = list(dict.fromkeys(ids))
    texts = [rng.choice(NASTY) + rng.choice(["", " "]) + rng.choice(NASTY) for _ in ids]
    if form == "jsonl" or form == "jsonl.gz":
        texts = [text + rng.choice(["", "\n", "\r\n", "\0"]) for text in texts]
        records = ({"_id": docid, "title": "", "text": text} for docid, text in zip(ids, texts))
        lines = [json.dumps(record, ensure_ascii=rng.random() < 0.5) + "\n" for record in records]
        blob = "".join(lines).encode()
    else:
        end = "\r\n" if form == "tsv crlf" else "\n"
        texts = [text.removesuffix("\r") for text in texts]
        lines = [f"{docid}\t{text}{end}{rng.choice(['', end])}" for docid, text in zip(ids, texts)]
        blob = "".join(lines).encode().removesuffix(end.encode())
    path = tmp_path / "c"
    path.write_bytes(gzip.compress(blob) if form.endswith("gz") else blob)
    corpus = Corpus(path)
    assert len(corpus) == len(ids) and corpus.texts(range(len(ids))) == texts and list(corpus) == texts
    assert [corpus.docid(row) for row in range(len(ids))] == ids
    assert [corpus.row(docid) for docid in ids] == list(range(len(ids)))
    asked = [rng.choice(ids + ["none", "", "doc-", "é"]) for _ in range(300)]
    assert corpus.find(asked).tolist() == [dict(zip(ids, range(len(ids)))).get(docid, -1) for docid in asked]
    with pytest.raises(ValueError, match="holds no passage 'none'"):
        corpus.row("none")
    with pytest.raises(IndexError):
        corpus[len(ids)]
    again = pickle.loads(pickle.dumps(corpus))
    assert again[5] == texts[5] and len(pickle.dumps(corpus)) < 1000


def test_corpus_joins_title_and_text(tmp_path):
    jsonl(tmp_path / "corpus.jsonl",
          [{"_id": "1", "title": "T", "text": "x"}, {"_id": 2, "title": None, "text": "y"},
           {"_id": "3", "text": ""}, {"_id": "4", "title": "T", "text": ""}])
    corpus = Corpus(tmp_path)
    assert list(corpus) == ["T x", "y", "", "T"] and corpus.row("2") == 1


def test_duplicate_ids_name_both_lines(tmp_path, monkeypatch):
    rows = [(f"p{i}", "x") for i in range(1000)]
    with pytest.raises(ValueError, match=r"c:1004: passage id 'p700' stands on line 704 already"):
        # The blank line counts.
        Corpus(tsv(tmp_path / "c", [("a", ""), ("b", "\n")] + rows + [("p700", "other")]))
    with pytest.raises(ValueError, match=r"d:1003: passage id 'p700' stands on line 701 already"):
        rows += [("new", ""), ("newer", ""), ("p700", "y")]
        Corpus(jsonl(tmp_path / "d", [{"_id": docid, "text": text} for docid, text in rows]))


def test_two_ids_with_one_hash(tmp_path, monkeypatch):
    """Refused when a corpus is built; an id that the corpus lacks, and whose hash it has, is unknown all the
    same."""
    hash_id = data.hash_id
    monkeypatch.setattr(data, "hash_id", lambda docid: hash_id(docid.lower()))
    corpus = Corpus(tsv(tmp_path / "c", [("a", "x"), ("b", "y")]))
    assert corpus.find(["A", "b", "B", "a"]).tolist() == [-1, 1, -1, 0] and corpus.row("b") == 1
    with pytest.raises(ValueError, match="holds no passage 'B'"):
        corpus.row("B")
    with pytest.raises(ValueError, match=r"d:3: 'A' has the hash of 'a' \(line 1\); rename one of the two"):
        Corpus(tsv(tmp_path / "d", [("a", "x"), ("b", "y"), ("A", "z")]))


def test_faults_deep_in_a_big_collection(tmp_path):
    good = b"".join(b"%d\tpassage\r\n" % i for i in range(500))
    faults = {
        b"no tab": "got 1 column",
        b"\r": "got 1 column",
        b"x y\tz": "cannot be an id",
        b"9999\t\xff": "not UTF-8",
        b"i" * 600 + b"\tz": "cannot be an id",
        b"\xc3\xa9" * 300 + b"\tz": "cannot be an id",
    }
    for bad, says in faults.items():
        (tmp_path / "c").write_bytes(good + bad + b"\r\n" + good)
        with pytest.raises(ValueError, match=f"c:501: .*{says}"):
            Corpus(tmp_path / "c")
    jsonl(tmp_path / "j", [{"_id": "1", "text": "fine"}, {"_id": "2", "text": "\ud83d"}])
    with pytest.raises(ValueError, match=r"j:2: holds half of a surrogate pair \(\\ud83d\)"):
        Corpus(tmp_path / "j")


def test_a_changed_source_is_read_again(tmp_path):
    path = tsv(tmp_path / "c.tsv", [("1", "old")])
    old = Corpus(path)
    made = os.stat(tmp_path / "c.tsv.store").st_mtime_ns
    # Unchanged: opened, not made again.
    assert Corpus(path)[0] == "old" and os.stat(tmp_path / "c.tsv.store").st_mtime_ns == made
    stat = os.stat(path)
    tsv(path, [("1", "new")])
    # Same size, same time: the digest of its ends tells.
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert Corpus(path)[0] == "new" and old[0] == "old"  # who has the old one mapped keeps it
    with pytest.raises(ValueError, match="another state of its source"):
        pickle.loads(pickle.dumps(old))


def test_a_torn_store_is_made_again(tmp_path):
    corpus = small_corpus(tmp_path)
    names = sorted(os.listdir(corpus.store.place))
    for name in names:
        whole = (corpus.store.place / name).read_bytes()
        for torn in (None, b"", whole[:10], whole[:-1], whole[:len(whole) // 2]):
            (corpus.store.place / name).unlink()  # not truncated in place: the old map would die with it
            if torn is not None:
                (corpus.store.place / name).write_bytes(torn)
            corpus = Corpus(tmp_path)
            assert corpus[7] == "passage 7" and sorted(os.listdir(corpus.store.place)) == names
    shutil.rmtree(corpus.store.place)
    corpus.store.place.write_bytes(b"a store of the former kind, one file")
    assert Corpus(tmp_path)[7] == "passage 7"


def test_a_copied_store_is_a_store(tmp_path):
    """Other times, the same bytes; the source is the same one."""
    corpus = small_corpus(tmp_path)
    before = os.stat(corpus.store.place).st_ino
    os.utime(corpus.store.place / "text", ns=(0, 0))
    assert Corpus(tmp_path)[7] == "passage 7" and os.stat(corpus.store.place).st_ino == before


def test_damage_in_a_store_is_found_by_its_checksums(tmp_path):
    store, cure = small_corpus(tmp_path).store, "remove the folder"
    data.check_files(store.place, store.meta["files"], cure, full=True)
    for file in store.place.iterdir():
        whole, stat = file.read_bytes(), file.stat()
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 1
        if file.name != "store.json":
            file.write_bytes(damaged)
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            says = f"c.*store/{file.name}: altered since it was written .*; remove the folder"
            with pytest.raises(ValueError, match=says):
                data.check_files(store.place, Corpus(tmp_path).store.meta["files"], cure, full=True)
            file.write_bytes(whole)


def test_a_source_that_grows_while_it_is_read(tmp_path, monkeypatch):
    path, read = tsv(tmp_path / "c.tsv", [("1", "a")]), data.read_texts

    def grow(source):
        yield from read(source)
        with open(source, "a") as file:
            file.write("2\tb\n")
    monkeypatch.setattr(data, "read_texts", grow)
    with pytest.raises(ValueError, match="changed while it was read"):
        Corpus(path)
    assert not (tmp_path / "c.tsv.store").exists()


def test_cache_folder(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
        tsv(tmp_path / name / "c.tsv", [("1", name)])
    assert [Corpus(tmp_path / name / "c.tsv", cache=tmp_path / "cache")[0] for name in "ab"] == ["a", "b"]
    monkeypatch.setenv("CORPUS_CACHE", str(tmp_path / "env"))
    assert Corpus(tmp_path / "a" / "c.tsv")[0] == "a"
    assert os.listdir(tmp_path / "a") == ["c.tsv"]
    assert len(os.listdir(tmp_path / "cache")) == 2 and len(os.listdir(tmp_path / "env")) == 1


def test_a_folder_that_cannot_be_written_says_the_cure(tmp_path, monkeypatch):
    path = tsv(tmp_path / "c.tsv", [("1", "a")])

    def refuse(lock, how):
        raise PermissionError(13, "Permission denied")  # root may write everywhere, so the refusal is played
    monkeypatch.setattr(data.fcntl, "flock", refuse)
    with pytest.raises(ValueError, match="cannot hold the store of .*Permission denied.*CORPUS_CACHE=DIR"):
        Corpus(path)
    monkeypatch.undo()
    Corpus(path)
    monkeypatch.setattr(data.fcntl, "flock", refuse)
    assert Corpus(path)[0] == "a"  # a store that stands is opened without a lock


def open_and_say(path, queue):
    corpus = Corpus(path)
    last, inode = corpus[len(corpus) - 1], os.stat(corpus.store.place).st_ino
    queue.put((os.getpid(), len(corpus), last, corpus.row("p7"), inode))


def test_many_processes_open_at_once(tmp_path):
    path = tsv(tmp_path / "c.tsv", [(f"p{i}", f"passage {i}") for i in range(100_000)])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=open_and_say, args=(path, queue)) for _ in range(8)]
    for worker in workers:
        worker.start()
    said = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert {s[1:4] for s in said} == {(100_000, "passage 99999", 7)}
    assert len({s[4] for s in said}) == 1  # one of them built, and all have the same file
    assert sorted(os.listdir(tmp_path)) == ["c.tsv", "c.tsv.store"]


def test_killed_while_building(tmp_path):
    """SIGKILL at eight moments of the build: the store then either is not there or is whole, and the next one
    to come makes it."""
    path = tsv(tmp_path / "c.tsv", [(f"p{i}", f"passage {i} " + "x" * (i % 300)) for i in range(60_000)])
    store, killed, whole = tmp_path / "c.tsv.store", 0, None
    slow = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import data; "
            f"print('go', flush=True); data.Corpus({str(path)!r})")
    for eighth in [None, *range(8)]:  # None: nobody disturbs the first, which tells how long it takes
        builder = subprocess.Popen([sys.executable, "-c", slow], stdout=subprocess.PIPE)
        builder.stdout.readline()
        began = time.perf_counter()
        if eighth is None:
            builder.communicate()
            whole = time.perf_counter() - began
        else:
            time.sleep(whole * (eighth + 0.5) / 8)
            builder.send_signal(signal.SIGKILL)
            builder.communicate()
        if store.exists():
            assert data.Store(store, {"source": data.state_of(path), "layout": "corpus 2"}).meta
            shutil.rmtree(store)
        else:
            killed += 1
    assert killed >= 2
    corpus = Corpus(path)
    assert len(corpus) == 60_000 and corpus[59_999].startswith("passage 59999") and corpus.row("p123") == 123
    assert sorted(os.listdir(tmp_path)) == ["c.tsv", "c.tsv.store"]  # what the dead left is gone


# Training rows

QUERIES = {f"q{i}": f"query {i}" for i in range(5)}
ROW = {"query": "query 1", "pos": ["p1"], "neg": ["p2", "p3", "p4"]}
ROWS = {
    "a query": ROW,
    "a qid": {"qid": "q1", "pos": ["p1"], "neg": ["p2", "p3", "p4"]},
    "both, numbers as ids, scores": {"qid": 1, "query": "query 1", "pos": [1], "neg": [2, 3, 4],
                                     "pos_scores": [9], "neg_scores": [2, 3, 4.5], "inline": False},
}


@pytest.mark.parametrize("kind", ROWS)
def test_rows_of_ids(tmp_path, kind):
    corpus = Corpus(tsv(tmp_path / "collection.tsv",
                        [(f"p{i}" if "number" not in kind else f"{i}", f"passage {i}") for i in range(10)]))
    rows = TrainingRows(jsonl(tmp_path / "t.jsonl", [ROWS[kind]] * 3), corpus, QUERIES)
    e, ids = rows.example(1, None), list(map(str, ROWS[kind]["pos"] + ROWS[kind]["neg"]))
    assert len(rows) == 3 and e.query == "query 1" and e.docids == ids and e.positives == {ids[0]}
    assert e.texts == [f"passage {i}" for i in (1, 2, 3, 4)]
    assert e.scores == ([9, 2, 3, 4.5] if "scores" in kind else None)
    assert rows.ids(1) == f"{tmp_path}/t.jsonl:2" and rows.too_few(3) == 0 and rows.too_few(4) == 3
    gz = tmp_path / "t.jsonl.gz"
    gz.write_bytes(gzip.compress((tmp_path / "t.jsonl").read_bytes()))
    assert TrainingRows(gz, corpus, QUERIES).example(1, None) == e


def test_rows_of_texts(tmp_path):
    row = {"query": "hi", "pos": ["yes", "also"], "neg": ["no\u2028", "nein"], "pos_scores": [1, 0.5],
           "neg_scores": [0.25, 0], "inline": True}
    rows = TrainingRows(jsonl(tmp_path / "f.jsonl", [row]))
    e = rows.example(0, None)
    assert e.texts == ["yes", "no\u2028", "nein"] and e.scores == [1, 0.25, 0]
    assert e.docids[0] in e.positives and len(e.positives) == 2
    firsts = {rows.example(0, 1, np.random.default_rng(seed)).texts[0] for seed in range(20)}
    assert firsts == {"yes", "also"}  # one of the positives, drawn


@pytest.mark.parametrize("row, texts", [
    ({"qid": "q1", "pos": [1], "neg": [2]}, ["one", "two"]),
    ({"qid": "q1", "pos": ["1"], "neg": ["2", "gone"]}, ["one", "two"]),
    ({"qid": "q1", "pos": ["1"], "neg": ["a cat"]}, ["one"]),
    ({"qid": "q1", "pos": ["a cat"], "neg": ["dogs"]}, None),  # texts are called texts, not guessed
    ({"qid": "q1", "pos": ["gone"], "neg": ["lost"]}, None),
    ({"qid": "q1", "pos": ["1"], "neg": ["a cat"], "inline": True}, ["1", "a cat"]),
    ({"qid": "q1", "pos": ["Paris"], "neg": [""], "inline": True}, ["Paris", ""]),
])
def test_ids_are_never_trained_on_as_texts(tmp_path, row, texts):
    corpus = Corpus(tsv(tmp_path / "collection.tsv", [("1", "one"), ("2", "two")]))
    path = jsonl(tmp_path / "t.jsonl", [row])
    if texts is None:
        with pytest.raises(ValueError, match=r't.jsonl:1, passage .*Rows of texts need "inline": true'):
            TrainingRows(path, corpus, QUERIES)
    else:
        assert TrainingRows(path, corpus, QUERIES).example(0, None).texts == texts


def test_ids_without_a_corpus(tmp_path):
    """A number between quotes was a text once."""
    for pos in 1034435, "1034435", "a text that does not say so":
        path = jsonl(tmp_path / "t.jsonl", [{"qid": "q1", "pos": [pos], "neg": []}])
        with pytest.raises(ValueError, match='t.jsonl:1: .*--corpus; .* add "inline": true'):
            TrainingRows(path, None, QUERIES)


def test_negatives_are_drawn_evenly_without_repeats(tmp_path):
    row = {"query": "a", "pos": ["p0"], "neg": [f"p{i}" for i in range(1, 9)], "pos_scores": [0],
           "neg_scores": list(range(1, 9))}
    rows, seen = TrainingRows(jsonl(tmp_path / "t.jsonl", [row]), small_corpus(tmp_path)), np.zeros(9)
    for seed in range(2000):
        e = rows.example(0, 3, np.random.default_rng(seed))
        # Every score stays with its passage.
        assert len(set(e.docids)) == 4 and e.scores == [int(docid[1:]) for docid in e.docids]
        seen[[int(docid[1:]) for docid in e.docids]] += 1
    assert np.abs(seen[1:] / 2000 - 3 / 8).max() < 0.05
    e = rows.example(0, 20, np.random.default_rng(0))
    # Too few: each once before one thrice.
    assert len(e.docids) == 21 and min(e.docids.count(docid) for docid in e.docids[1:]) >= 2
    assert rows.example(0, 5, np.random.default_rng(7)) == rows.example(0, 5, np.random.default_rng(7))


def test_unknown_ids_are_counted_and_left_out(tmp_path):
    corpus = small_corpus(tmp_path)
    lines = [{"query": "a", "pos": ["p1"], "neg": ["p2", "gone", "p1", "p2"]},
             {"query": "b", "pos": ["gone"], "neg": ["p2"]},
             {"qid": "q9", "pos": ["p1"], "neg": ["p2"]},
             {"query": "c", "pos": ["p3"], "neg": ["gone"]}]
    path = jsonl(tmp_path / "t.jsonl", lines)
    for _ in "built", "opened":
        rows = TrainingRows(path, corpus, QUERIES)
        assert [rows[i].query for i in range(len(rows))] == ["a", "c"]
        assert rows.example(0, None).docids == ["p1", "p2"]
        for part in ("2 of 4 rows", "1 rows without their query", "1 rows without a known positive",
                     "1 unknown positives", "2 unknown negatives", "1 negatives that are positives",
                     "t.jsonl:2, passage 'gone'"):
            assert part in rows.report
    rows = TrainingRows(path, corpus, QUERIES, need_negatives=True)
    assert len(rows) == 1 and "1 without a negative left out" in rows.report
    jsonl(path, lines[1:3])
    with pytest.raises(ValueError, match=r"none of 2 rows can be used: .*1 rows without .*t.jsonl:1, passage "
                                         r"'gone'; are these the corpus"):
        TrainingRows(path, corpus, QUERIES)
    with pytest.raises(ValueError, match="no row has a negative"):
        TrainingRows(jsonl(path, lines[3:]), corpus, need_negatives=True)


def test_the_same_rows_with_another_corpus_or_queries(tmp_path):
    path = jsonl(tmp_path / "t.jsonl", [{"qid": "q1", "pos": ["p1"]}])
    (tmp_path / "other").mkdir()
    tsv(tmp_path / "other" / "collection.tsv", [("p1", "another text")])
    rows = TrainingRows(path, small_corpus(tmp_path), QUERIES)
    assert rows.example(0, 4, np.random.default_rng(0)).texts == ["passage 1"]
    assert TrainingRows(path, tmp_path / "other", QUERIES).example(0, None).texts == ["another text"]
    assert TrainingRows(path, tmp_path / "other", {"q1": "changed"}).example(0, None).query == "changed"


@pytest.mark.parametrize("line, says", [
    ('{"query": "a", "pos": ["p1"], "neg": ["p2"], "pos_scores": [1], "neg_scores": []}',
     r'expected 1 finite numbers under "neg_scores", one for each of "neg", got \[\]'),
    ('{"query": "a", "pos": ["p1"], "neg": ["p2"], "pos_scores": [1]}', 'under "neg_scores"'),
    ('{"query": "a", "pos": ["p1"], "neg": ["p2"], "neg_scores": [1]}', 'under "pos_scores"'),
    ('{"query": "a", "pos": ["p1"], "neg": ["p2"], "pos_scores": [NaN], "neg_scores": [1]}',
     'under "pos_scores".* got .nan'),
    ('{"query": "a", "pos": ["p1"], "neg": ["p2"], "pos_scores": ["x"], "neg_scores": [1]}',
     'under "pos_scores".* got ..x'),
    ('{"query": "a", "pos": ["p1"], "pos_scores": 3}', 'under "pos_scores".* got 3'),
    ('{"query": "a", "pos": "p1"}', 'expected .*"pos": .*; got .*"p1".*python -m tools.convert'),
    ('{"query": "a", "pos": ["p1"], "neg": {"bm25": ["p2"]}}', "expected .*python -m tools.convert"),
    ('{"query": "a", "pos": ["p1", null]}', 'expected passages under "pos", got .*None'),
    ('{"pos": ["p1"], "neg": []}', "expected the query's text or a qid, got None"),
    ('{"query": ["a"], "pos": ["p1"]}', "expected the query's text or a qid, got .'a'"),
    ('{"query": "a", "pos": ["p1"], "inline": "yes"}', "got 'yes'"),
    ('{"question": "a", "pos_pid": "p1"}', "expected .*; got .*pos_pid.*python -m tools.convert"),
    ('{"query": "a", "pos": ["\\ud83d"], "inline": true}', "half of a surrogate pair"),
    ('{"query": "a \\ud83d", "pos": ["p1"]}', "half of a surrogate pair"),
    ('{"query": "a"', "not JSON"),
    ("1\t2\tq1\tp1\tp2", "not JSON"),
])
def test_faults_in_rows_name_their_line(tmp_path, line, says):
    path = tmp_path / "t"
    path.write_text(json.dumps(ROW) + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match=f"t:3: .*{says}"):
        TrainingRows(path, small_corpus(tmp_path), QUERIES)


def test_scores_from_a_file_and_scores_that_miss(tmp_path):
    corpus = small_corpus(tmp_path)
    path = jsonl(tmp_path / "t.jsonl", [ROWS["a qid"], {"qid": "q2", "pos": ["p5", "p6"], "neg": ["p7"]}])
    teacher = {"q1": {"p1": 5, "p2": 1.5, "p4": -1}, "q2": {"p6": 3, "p7": 2}}
    scores = tmp_path / "ce.json.gz"
    scores.write_bytes(gzip.compress(json.dumps(teacher).encode()))
    rows = TrainingRows(path, corpus, QUERIES, need_scores=True, scores=scores)
    # P3 has no score.
    ids, texts = ["p1", "p2", "p4"], ["passage 1", "passage 2", "passage 4"]
    assert rows.example(0, None)[2:5] == (ids, texts, [5, 1.5, -1])
    assert rows.example(1, None).docids == ["p6", "p7"] and "2 passages without a score" in rows.report
    with pytest.raises(ValueError, match=r"t.jsonl:1: has no teacher scores \(nor have 1 more of 2 rows\); "
                                         r"`python -m tools.score`"):
        TrainingRows(path, corpus, QUERIES, need_scores=True)
    with pytest.raises(ValueError, match="--corpus"):
        TrainingRows(path, None, QUERIES)
    with gzip.open(tmp_path / "ce.pkl.gz", "wb") as file:
        pickle.dump({"q1": {"p1": 5.0, "p2": 1.5, "p4": -1.0}}, file)
    with pytest.raises(ValueError, match="is a pickle, which may run any code") as e:
        TrainingRows(path, corpus, QUERIES, scores=tmp_path / "ce.pkl.gz")
    cure = str(e.value).split("; python ")[1].replace("--out scores.json", f"--out {tmp_path}/cured.json.gz")
    run(*cure.split())  # the cure that it prints works
    cured = TrainingRows(path, corpus, QUERIES, scores=tmp_path / "cured.json.gz")
    assert cured.example(0, None).scores == [5, 1.5, -1]


@pytest.mark.parametrize("teacher, says", [
    ([], "expected {qid"), ({"q1": [["p1", 3]]}, "query 'q1' has .*expected {qid"),
    ({"q1": {"p1": float("nan")}}, "query 'q1' has .*nan"), ({"q1": {"p1": "3.2"}}, "query 'q1' has .*3.2")])
def test_scores_that_are_none(tmp_path, teacher, says):
    (tmp_path / "s.json").write_text(json.dumps(teacher))
    with pytest.raises(ValueError, match=f"s.json: .*{says}"):
        TrainingRows(jsonl(tmp_path / "t.jsonl", [ROW]), small_corpus(tmp_path), scores=tmp_path / "s.json")


def test_rows_that_a_score_file_lacks_are_left_out(tmp_path):
    path = jsonl(tmp_path / "t.jsonl", [{"qid": "q1", "pos": ["p1"], "neg": ["p2"]},
                                        {"qid": "q2", "pos": ["p3"], "neg": ["p4"]}])
    (tmp_path / "s.json").write_text('{"q1": {"p1": 3, "p2": 1}}')
    rows = TrainingRows(path, small_corpus(tmp_path), QUERIES, need_scores=True, scores=tmp_path / "s.json")
    assert len(rows) == 1 and rows.example(0, None).scores == [3, 1]
    assert "2 passages without a score" in rows.report and "t.jsonl:2" in rows.report


def test_the_positives_of_a_querys_other_rows_are_known(tmp_path):
    """Mining writes a row for each positive: in a shared batch neither is the other's negative."""
    path = jsonl(tmp_path / "t.jsonl", [
        {"qid": "q1", "pos": ["p1"], "neg": ["p4"]}, {"qid": "q2", "pos": ["p1"]},
        {"qid": "q1", "pos": ["p2"]}, {"query": "a", "pos": ["p1"]}, {"query": "a", "pos": ["p3"]}])
    for _ in "built", "opened":
        rows = TrainingRows(path, small_corpus(tmp_path), QUERIES)
        known = [rows.example(i, 1, np.random.default_rng(0)).positives for i in range(5)]
        # Without a qid two queries of the same words are two queries.
        assert known == [{"p1", "p2"}, {"p1"}, {"p1", "p2"}, {"p1"}, {"p3"}]


def test_rows_are_cheap_to_send_to_workers(tmp_path):
    rows = TrainingRows(jsonl(tmp_path / "t.jsonl", [ROW] * 20_000), small_corpus(tmp_path))
    sent = pickle.dumps(rows)
    there = pickle.loads(sent).example(19_999, 2, np.random.default_rng(1))
    assert len(sent) < 2000 and there == rows.example(19_999, 2, np.random.default_rng(1))


# Real files

def test_scifact_and_msmarco(shared, tmp_path):
    lines = (shared / "data/scifact/corpus.jsonl").read_bytes().decode().split("\n")
    beir = [json.loads(line) for line in lines if line]
    corpus = Corpus(shared / "data/scifact", cache=tmp_path)
    assert list(corpus) == [f"{r['title']} {r['text']}" for r in beir]
    assert [corpus.docid(i) for i in range(5183)] == [r["_id"] for r in beir]
    assert len(read_queries(shared / "data/scifact")) == 1109
    lines = (shared / "data/msmarco_sample/collection.tsv").read_bytes().decode().split("\n")[:-1]
    marco = Corpus(shared / "data/msmarco_sample/collection.tsv", cache=tmp_path)
    assert [f"{marco.docid(i)}\t{marco[i]}" for i in range(len(marco))] == lines and len(marco) == 4103
    assert read_queries(shared / "data/msmarco_sample/queries.tsv")["156493"] == "do goldfish grow"
