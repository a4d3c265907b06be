"""Which files of a source are training text: of a folder, the standard library, or a dataset on the Hub.

The test and validation splits of a dataset are held out. Which files are "train" is decided by the `datasets` library:
it is given a folder of empty files with the same names and the same card. This decides for every dataset on the Hub. It
decides for a local folder that has a dataset card, or in which the library finds a train split by name. Of other
folders all files are taken.

A source is a root and the files below it, in sorted order. `Report` counts what is taken and left out, by kind.
"""

import contextlib
import os
import re
import stat
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from hnet_runtime import DataError
from hnet_runtime.data.documents import KINDS, Reject, first_line, has_rows, in_words, is_settings, kind, suffixes

CARD, MORE_OF_CARD = "README.md", (".huggingface.yaml", "dataset_infos.json")  # other files that `datasets` reads
NAMED_LIKE = "takes folders and files that are named like a held-out split, too"
HELD_OUT = re.compile(r"(^|[-._ 0-9])(validation|valid|dev|val|test|testing|eval|evaluation)([-._ 0-9]|$)")
SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<total>\d{5})(?P<rest>\..*)")


class File(NamedTuple):
    """A file of a source."""

    path: str  # relative to the root
    bytes: int  # -1 for a link to a missing file
    version: str | int  # changes when the file does


class Report:
    """Files taken and left out of a source, counted by kind, with examples."""

    def __init__(self):
        self.taken: Counter[str] = Counter()
        self.left: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.notes: list[str] = []
        self.numbered: dict[tuple[str, ...], set[int]] = {}  # for names such as train-00000-of-00002.parquet

    def take(self, path: str) -> None:
        self.taken[kind(path)] += 1
        if found := SHARD.fullmatch(path):
            self.numbered.setdefault(found.group("stem", "total", "rest"), set()).add(int(found["number"]))

    def leave(self, what: str, path: str) -> None:
        self.left[what] += 1
        examples = self.examples.setdefault(what, [])
        if len(examples) < 3:
            examples.append(in_words(path))

    def note(self, what: str, paths: list[str]) -> None:
        """Adds a sentence about some files, with a few of their names."""
        if paths:
            some = ", ".join(map(in_words, paths[:3])) + (f" and {len(paths) - 3:,} more" if len(paths) > 3 else "")
            self.notes.append(f"{what}: {some}")

    def finish(self) -> None:
        """Notes the files that are missing from a numbered series. To be called when all files are known."""
        for (stem, total, rest), there in self.numbered.items():
            missing = sorted(set(range(int(total))) - there)
            self.note(
                "by the numbers in their names these files are missing",
                [f"{stem}-{n:05d}-of-{total}{rest}" for n in missing],
            )

    def lines(self) -> list[str]:
        """The report as sentences, one per line."""

        def plural(n: int) -> str:
            return f"{n:,} file" + "s" * (n != 1)

        def some(what: str) -> str:
            examples = self.examples[what][: 1 if len(self.left) > 3 else 3]
            return ", ".join([*examples, *["..."] * (self.left[what] > len(examples))])

        counted = ", ".join(f"{n:,} {what}" for what, n in self.taken.most_common())
        lines = [f"takes {plural(self.taken.total())} ({counted or 'none of a kind that is read'})"]
        if self.left:
            kinds = sorted(self.left.items(), key=lambda item: (not item[0].startswith("of the"), -item[1]))
            parts = [f"{what}: {n:,} ({some(what)})" for what, n in kinds[:8]]
            parts += [f"{len(kinds) - 8} more kinds"] * (len(kinds) > 8)
            lines.append(f"leaves out {plural(self.left.total())}: {'; '.join(parts)}")
        return lines + self.notes

    def as_dict(self) -> dict:
        left = {what: {"files": n, "examples": self.examples[what]} for what, n in sorted(self.left.items())}
        return {"taken": dict(sorted(self.taken.items())), "left_out": left, "notes": self.notes}


def find(source: str, column: str, reject: Reject, report: Report) -> tuple[str, Iterator[File]]:
    """The root and the files of a source; `report` is filled while they are read.

    source: stdlib, a file, a folder, or hf:owner/name[@revision][:config]. column: the column with the
    text of rows. `reject` is called for folders and links that can't be read.
    """
    if source == "stdlib":
        root = sysconfig.get_path("stdlib")
        return root, _of_stdlib(root, reject, report)
    if source.startswith("hf:"):
        return _of_hub(source, reject, report)
    name = in_words(source)
    if os.path.isfile(source):
        if not kind(source):
            raise DataError(f"{name}: expected one of {KINDS}")
        found = os.stat(source)
        report.take(os.path.basename(source))
        return os.path.dirname(source), iter([File(os.path.basename(source), found.st_size, found.st_mtime_ns)])
    if os.path.isdir(source):
        return source, _of_folder(source, column, reject, report)
    if os.path.exists(source):
        raise DataError(f"{name}: neither a file nor a folder; expected one of them")
    what = "a link to a file that is missing" if os.path.lexists(source) else "no such file or folder"
    raise DataError(f"{name}: {what} (expected one, or stdlib, or hf:owner/name[:config])")


# ------------------------------------------------------------------------------------------------------- folders


def _walk(root: str, reject: Reject, report: Report, skip: tuple[str, ...] = ()) -> Iterator[File]:
    """Files below a folder in sorted order, one folder's names in memory at a time.

    Links are followed, except to a folder that was reached before or contains the root. Hidden files are left out.
    """

    def identity(path: str) -> tuple[int, int] | str:
        found = os.stat(path)
        return (found.st_dev, found.st_ino) if found.st_ino else os.path.realpath(path)

    def entries(below: str) -> Iterator[os.DirEntry]:
        folder = os.path.join(root, below)
        try:
            with os.scandir(folder) as found:
                return iter(sorted(found, key=lambda entry: entry.name))
        except OSError as e:
            reject(f"{in_words(folder)}: can't be read ({e.strerror})")
            return iter(())

    reached = set()
    for folder in (root, *Path(os.path.realpath(root)).parents):
        with contextlib.suppress(OSError):
            reached.add(identity(str(folder)))
    open_folders = [("", entries(""))]
    while open_folders:
        below, rest = open_folders[-1]
        if (entry := next(rest, None)) is None:
            open_folders.pop()
            continue
        path = os.path.join(below, entry.name)
        if entry.name.startswith(".") or entry.name in skip:
            report.leave("hidden", path)
            continue
        try:
            found = entry.stat()
        except OSError as e:
            if not entry.is_symlink():
                reject(f"{in_words(os.path.join(root, path))}: can't be read ({e.strerror})")
            elif kind(path):
                yield File(path, -1, "")
            else:
                report.leave("link that leads nowhere", path)
            continue
        if stat.S_ISDIR(found.st_mode):
            try:
                known = identity(entry.path)
            except OSError as e:
                reject(f"{in_words(entry.path)}: can't be read ({e.strerror})")
                continue
            if known in reached:
                report.leave("link to a folder that is above or was read before", path)
                continue
            reached.add(known)
            open_folders.append((path, entries(path)))
        elif stat.S_ISREG(found.st_mode):
            yield File(path, found.st_size, found.st_mtime_ns)
        else:
            report.leave("neither file nor folder", path)


def _of_stdlib(root: str, reject: Reject, report: Report) -> Iterator[File]:
    held_out: dict[str, None] = {}
    for file in _walk(root, reject, report, skip=("site-packages", "dist-packages", "__pycache__")):
        if file.path.endswith(".py") and file.bytes >= 0:
            held_out.update(dict.fromkeys(_named_like_held_out(file.path)))
            report.take(file.path)
            yield file
        else:
            report.leave(suffixes(file.path) or "without suffix", file.path)
    report.note(NAMED_LIKE, list(held_out))


def _of_folder(root: str, column: str, reject: Reject, report: Report) -> Iterator[File]:
    with_rows: set[str] = set()  # folders with rows: a README.md there describes them
    texts = code = trains = False
    for file in _walk(root, _ignore, Report()):
        found = kind(file.path)
        texts, code = texts or found.startswith(".txt"), code or found == ".py"
        trains = trains or "train" in file.path
        if has_rows(file.path) and os.path.dirname(file.path) not in with_rows:
            with_rows.update(map(str, Path(file.path).parents), [os.path.dirname(file.path)])
    split_of, card = None, {}
    if with_rows or texts:  # the library does not take .py and .md for text
        card = _front_matter(os.path.join(root, CARD))
    if "configs" in card or ((card or trains) and (with_rows or not code)):
        split_of = _splits_of_folder(root, bool(card))
    held_out: dict[str, None] = {}
    for file in _walk(root, reject, report):
        folder, name = os.path.split(file.path)
        place, found = in_words(os.path.join(root, file.path)), kind(file.path)
        is_json = found.startswith(".json") and not found.startswith(".jsonl")
        if name.lower() == CARD.lower() and (folder in with_rows or (split_of and not folder)):
            report.leave("dataset card", file.path)
        elif not found:
            report.leave(suffixes(file.path) or "without suffix", file.path)
        elif split_of is not None and split_of.get(file.path) != "train":
            report.leave(_not_train(split_of.get(file.path), found), file.path)
        elif file.bytes < 0:
            reject(f"{place}: a link to a file that is missing")
        elif is_json and is_settings(os.path.join(root, file.path), column):
            report.leave(f"{found} without rows", file.path)
        else:
            if split_of is None:
                held_out.update(dict.fromkeys(_named_like_held_out(file.path)))
            report.take(file.path)
            yield file
    report.note(NAMED_LIKE, list(held_out))
    report.finish()


def _ignore(*_) -> None:
    pass


def _not_train(split: str | None, found: str) -> str:
    return f"of the {split} split" if split else f"{found} of no split"


def _named_like_held_out(path: str) -> Iterator[str]:
    """The first folder of a path that is named like a validation or test split, or the file if it is data."""
    parts = path.split(os.sep)
    for n, part in enumerate(parts, 1):
        if HELD_OUT.search(part) and (n < len(parts) or kind(part) not in (".py", ".md")):
            yield os.sep.join(parts[:n]) + ("/" if n < len(parts) else "")
            return


def _splits_of_folder(root: str, card: bool) -> dict[str, str] | None:
    """The split of each file of a local folder that is a dataset; None if all its files are to be taken.

    card: whether the folder has a dataset card.
    """
    contents = {}
    for name in (CARD, *MORE_OF_CARD) if card else ():
        with contextlib.suppress(OSError):
            contents[name] = Path(root, name).read_bytes()
    here, all_of_them = [], []  # without links to missing files, and with them
    for file in _walk(root, _ignore, Report()):
        all_of_them.append(file.path)
        here += [file.path] * (file.bytes >= 0)
    try:
        splits, by_name = decide(in_words(root), here, contents)
    except DataError:
        if card:
            raise
        return None
    train = splits.get("train", [])
    is_split = any(map(has_rows, train)) or (len(splits) > 1 and any(kind(name).startswith(".txt") for name in train))
    if not card and not (by_name and is_split):
        return None
    require_train(in_words(root), splits)
    if len(here) < len(all_of_them):
        splits = decide(in_words(root), all_of_them, contents)[0]
    return {name: split for split, files in splits.items() for name in files}


def _front_matter(path: str) -> dict:
    """The declarations at the head of a dataset's card; empty if there is no card, or README.md is not one."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        with open(path, encoding="utf-8") as f:
            if f.readline().rstrip() != "---":
                return {}
        from huggingface_hub import metadata_load

        try:
            return metadata_load(path) or {}
        except Exception as e:
            raise DataError(f"{in_words(path)}: the head of this card is damaged ({first_line(e)})") from e
    return {}


# ------------------------------------------------------------------------------------------ splits, and the hub


def decide(
    spec: str, names: Iterable[str], contents: dict[str, bytes], config: str = ""
) -> tuple[dict[str, list[str]], bool]:
    """The files of each split of a dataset, as the `datasets` library finds them; and whether names show the splits.

    names: all files of the dataset. contents: those of files that declare splits, such as the card. config: a config
    of the card, "" for its default one; if the card declares none, a folder. Raises DataError.
    """
    import datasets
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns
    from datasets.exceptions import DataFilesNotFoundError

    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as top:
        root, originals = os.path.join(os.path.realpath(top), "files"), {}
        os.mkdir(root)
        for name in [*names, *contents]:
            shown = name.encode(errors="surrogateescape").decode(errors="replace")  # the library expects UTF-8
            originals.setdefault(shown, {})[name] = None
            os.makedirs(os.path.dirname(os.path.join(root, shown)), exist_ok=True)
            Path(root, shown).write_bytes(contents.get(name, b""))
        below = ""
        try:
            configs = datasets.get_dataset_config_names(root)
            if not config and len(configs) > 1 and datasets.get_dataset_default_config_name(root) is None:
                raise DataError(_one_of(spec, configs))
            declared = "configs" in _front_matter(os.path.join(root, CARD))
            if config and not declared and os.path.isdir(os.path.join(root, config)):
                config, below = "", config
            if config and config not in configs:
                raise DataError(_one_of(spec, configs))
            cache = os.path.join(top, "cache")
            builder = datasets.load_dataset_builder(root, config or None, data_dir=below or None, cache_dir=cache)
            files = builder.config.data_files
        except (EmptyDatasetError, DataFilesNotFoundError):
            return {}, False
        except DataError:
            raise
        except Exception as e:
            if "same data file format" not in str(e):
                why = first_line(e).replace(root + os.sep, "").replace(root, "it")
                raise DataError(f"{spec}: the datasets library can't tell which files are which ({why})") from e
            where = os.path.join(root, below)  # the library expects one format in all splits
            files = DataFilesDict.from_patterns(get_data_patterns(where), base_path=where)
        by_name = False
        with contextlib.suppress(EmptyDatasetError):
            by_name = get_data_patterns(os.path.join(root, below)) != {"train": ["**"]}
        splits = {}
        for split, paths in files.items():
            shown = sorted({os.path.relpath(path, root) for path in paths})
            splits[str(split)] = [name for path in shown for name in originals.get(path, ())]
        return splits, by_name


def _one_of(spec: str, configs: list[str]) -> str:
    some = ", ".join(sorted(configs)[:8]) + (", ..." if len(configs) > 8 else "")
    if not spec.startswith("hf:"):
        return f"{spec}: its card has several configs ({some}); name the files or the folder of one"
    return f"{spec}: expected hf:{spec[3:].partition(':')[0]}:CONFIG, with CONFIG one of {some}"


def require_train(spec: str, splits: dict[str, list[str]]) -> list[str]:
    """The readable files of the train split. Raises DataError, with the splits that exist, if there are none."""
    others = ", ".join(splits)
    if splits and not splits.get("train"):
        raise DataError(f"{spec}: has no train split, only {others}; prepare takes no text that is held out")
    train = splits.get("train", [])
    chosen = [name for name in train if kind(name)]
    if not chosen:
        found = ", ".join(sorted({suffixes(name) or "without suffix" for name in train})) or "none"
        advice = f"; try {spec.split(':')[0]}:{spec.split(':')[1].split('@')[0]}@refs/convert/parquet"
        raise DataError(
            f"{spec}: expected data files of {KINDS}; found {found}{advice if spec.startswith('hf:') else ''}"
        )
    return chosen


def _of_hub(spec: str, reject: Reject, report: Report) -> tuple[str, Iterator[File]]:
    """The data files of a dataset on the Hub, at one commit; without a network, those in the Hub's cache."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    name, _, config = spec.removeprefix("hf:").partition(":")
    repo, _, revision = name.partition("@")
    try:
        api = hub.HfApi()
        info = api.dataset_info(repo, revision=revision or None)
        names, contents = [file.rfilename for file in info.siblings], {}
        for name in {CARD, *MORE_OF_CARD} & set(names):
            contents[name] = Path(hub.hf_hub_download(repo, name, repo_type="dataset", revision=info.sha)).read_bytes()
        chosen, sizes = _choose(spec, names, contents, config, report), {}
        for i in range(0, len(chosen), 500):
            found = api.get_paths_info(repo, chosen[i : i + 500], revision=info.sha, repo_type="dataset")
            sizes |= {file.path: file.size for file in found}
        return f"hf://datasets/{repo}@{info.sha}", (File(name, sizes[name], info.sha) for name in chosen)
    except DataError:
        raise
    except errors.HFValidationError as e:
        raise DataError(f"{spec}: not a dataset's name; expected hf:owner/name[@revision][:config]") from e
    except errors.GatedRepoError as e:
        raise DataError(f"{spec}: accept its terms on the hub and log in (hf auth login), then try again") from e
    except errors.RepositoryNotFoundError as e:
        raise DataError(f"{spec}: the hub has no dataset {repo} (or it is private: hf auth login)") from e
    except errors.RevisionNotFoundError as e:
        raise DataError(f"{spec}: {repo} has no revision {revision}") from e
    except Exception as e:  # offline, or an error of the HTTP library of this huggingface_hub
        reason = first_line(e)
    where = {"repo_type": "dataset", "revision": revision or None}
    try:
        root = hub.snapshot_download(repo, **where, local_files_only=True, allow_patterns=[])
    except errors.LocalEntryNotFoundError as e:
        raise DataError(f"{spec}: not in the hub's cache, and the hub can't be reached ({reason})") from e
    files = {file.path: file for file in _walk(root, reject, Report())}
    contents = {name: Path(root, name).read_bytes() for name in (CARD, *MORE_OF_CARD) if Path(root, name).is_file()}
    with contextlib.suppress(Exception):  # not every release stores the Hub's list for every download
        files = {file.path: File(file.path, -1, "") for file in hub.get_cached_repo_tree(repo, **where)} | files
    chosen = _choose(spec, list(files), contents, config, report)
    here = [name for name in chosen if files[name].bytes >= 0]
    report.notes.insert(0, f"no network; taking the {len(here)} files that the hub's cache holds")
    for name in chosen:
        if files[name].bytes < 0:
            reject(f"{spec}: {name} is missing from the hub's cache; download it again")
    return root, (files[name]._replace(version=os.path.basename(root)) for name in here)


def _choose(spec: str, names: list[str], contents: dict[str, bytes], config: str, report: Report) -> list[str]:
    """The readable training files of a dataset."""
    splits = decide(spec, names, contents, config)[0]
    chosen = require_train(spec, splits)
    split_of, taken = {name: split for split, files in splits.items() for name in files}, set(chosen)
    for name in sorted(names):
        split = split_of.get(name)
        if name in taken:
            report.take(name)
        elif name == CARD:
            report.leave("dataset card", name)
        elif name.rpartition("/")[2].startswith("."):
            report.leave("hidden", name)
        else:
            what = suffixes(name) or "without suffix"
            report.leave(what if split == "train" or not (split or kind(name)) else _not_train(split, what), name)
    report.finish()
    return chosen
