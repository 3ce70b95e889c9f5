"""Inodes and names: what lives how long, and which answer counts."""

from __future__ import annotations

import stat

import msgspec
import pytest

from hpcfs.inodes.tree import ATTRIBUTE_SECONDS, ROOT_INO, Node, Tree
from hpcfs.model.entries import Entry
from hpcfs.model.errors import Stale

FILE = Entry(b"", stat.S_IFREG | 0o644, 1, 0, 0, 1, 1, b"v")
FOLDER = msgspec.structs.replace(FILE, mode=stat.S_IFDIR | 0o755, version=b"")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def tree() -> Tree:
    return Tree(Node(ROOT_INO, None, b"", None, FOLDER), Clock())


def add(tree: Tree, *names: bytes) -> Node:
    """The last of these, made below each other; each is known to the kernel once."""
    node = tree.root
    for name in names:
        entry = FILE if name is names[-1] else FOLDER
        node = tree.child(node, name) or tree.add(node, name, entry, tree.now())
        tree.count_lookup(node)
    return node


def test_an_inode_comes_from_the_path_in_every_mount(tree: Tree) -> None:
    other = Tree(Node(ROOT_INO, None, b"", None, FOLDER))
    other.add(other.root, b"before", FILE, 0.0)
    assert add(tree, b"a", b"b").ino == add(other, b"a", b"b").ino
    assert add(tree, b"a", b"c").ino != add(tree, b"a", b"b").ino


def test_a_node_that_took_anothers_name_has_another_inode(tree: Tree) -> None:
    first = add(tree, b"f")
    tree.detach(first)
    assert tree.get(first.ino) is first, "the kernel still knows it"
    second = add(tree, b"f")
    assert second.ino != first.ino
    assert not first.is_attached
    assert second.is_attached


def test_what_the_kernel_forgot_is_gone_up_to_the_root(tree: Tree) -> None:
    file = add(tree, b"d", b"e", b"f")
    folders = [file.parent, file.parent.parent] if file.parent else []
    for folder in folders:
        assert folder
        tree.forget(folder.ino, 1)
    assert len(tree) == 4
    tree.forget(file.ino, 1)
    assert len(tree) == 1
    with pytest.raises(Stale):
        tree.get(file.ino)
    tree.forget(file.ino, 1)


def test_a_node_looked_up_twice_is_forgotten_twice(tree: Tree) -> None:
    file = add(tree, b"f")
    tree.count_lookup(file)
    tree.forget(file.ino, 1)
    assert tree.get(file.ino) is file
    tree.forget(file.ino, 1)
    assert len(tree) == 1


def test_an_answer_to_an_older_question_does_not_count(tree: Tree) -> None:
    clock = tree.now
    assert isinstance(clock, Clock)
    file = add(tree, b"f")
    asked = clock.now
    clock.now += 1
    tree.set_local(file, msgspec.structs.replace(FILE, size=9))
    tree.update(file, FILE, asked)
    assert file.entry.size == 9
    clock.now += 1
    tree.update(file, FILE, clock.now)
    assert file.entry.size == 1


def test_attributes_are_believed_for_a_second(tree: Tree) -> None:
    clock = tree.now
    assert isinstance(clock, Clock)
    file = add(tree, b"f")
    assert tree.is_fresh(file)
    clock.now += ATTRIBUTE_SECONDS
    assert not tree.is_fresh(file)
    tree.update(file, FILE, clock.now)
    assert tree.is_fresh(file)
    tree.expire(file)
    assert not tree.is_fresh(file)


def test_a_move_changes_the_paths_below_but_no_inode(tree: Tree) -> None:
    file = add(tree, b"d", b"f")
    folder, ino = file.parent, file.ino
    assert folder
    target = add(tree, b"t", b"x").parent
    assert target
    replaced = add(tree, b"t", b"n")
    tree.move(folder, (tree.root, b"d"), target, b"n")
    assert (file.path, file.ino) == (b"t/n/f", ino)
    assert tree.child(target, b"n") is folder
    assert tree.child(tree.root, b"d") is None
    assert not replaced.is_attached
    assert replaced.path == b"t/n", "the last one it had"
    for node in (file, folder, replaced):
        tree.forget(node.ino, node.lookups)
    assert {node.name for node in tree.root.below()} == {b"", b"t", b"x"}


def test_removals_are_noted_while_a_directory_is_read(tree: Tree) -> None:
    add(tree, b"f")
    tree.root.removals = {}
    before = tree.clock
    tree.note_gone(tree.root, b"f")
    tree.note_gone(tree.root, b"never known here")
    assert {b"f", b"never known here"} == set(tree.root.removals)
    assert min(tree.root.removals.values()) > before
    add(tree, b"f")
    assert b"f" not in tree.root.removals


def test_a_name_is_told_to_watchers_once_the_tree_no_longer_knows_better(tree: Tree) -> None:
    """Each write sets an entry: that tells nobody. A node that is forgotten afterwards does."""
    told: list[tuple[bytes, bool]] = []
    written, looked_at = add(tree, b"written"), add(tree, b"looked at")
    tree.watch_names(lambda parent, name, below: told.append((name, below)))
    tree.set_local(written, FILE)
    assert not told
    for node in (written, looked_at):
        tree.forget(node.ino, 1)
    assert told == [(b"written", False)]
