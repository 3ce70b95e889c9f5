"""Where symbolic links of a remote may lead: to nothing outside of its namespace."""

from __future__ import annotations

import posixpath
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from hpcfs.model.errors import AlreadyExists, LeadsOut, NoSuchKind, NotFound
from hpcfs.site.namespace import SymlinkMode
from tests.filesystem.world import KINDS, World, world
from tests.support.memory_remote import MemoryRemote

MOUNT = b"/home/me/mnt"
Story = Callable[[World], Awaitable[None]]


def run(directory: Path, kind: str, story: Story, symlinks: SymlinkMode = "contain") -> None:
    async def main() -> None:
        remote = MemoryRemote(kind)
        remote.roots = (b"/srv/data", b"/gpfs/data")
        remotes = {"ns": remote}
        async with world(directory, remotes, symlinks=symlinks, mountpoint=MOUNT) as w:
            with trio.fail_after(20):
                await story(w)

    trio.run(main)


async def target_of(w: World, path: str) -> bytes | None:
    """None where the mount refuses."""
    node = await w.kernel.walk(path)
    try:
        return await w.fs.readlink(node.ino)
    except LeadsOut:
        return None


async def planted(w: World, *links: tuple[str, str], directories: str = "a a/b a/b/c d") -> None:
    """Made on the remote, by others."""
    for name in directories.split():
        await w.remote.make_directory(name.encode(), 0o755)
    for path, target in links:
        await w.remote.make_symlink(path.encode(), target.encode())


CASES = {
    # (where the link is, its target): what readlink answers, None for a refusal
    ("a/b/l", "f"): "f",
    ("a/b/l", "./f"): "./f",
    ("a/b/l", "c/f"): "c/f",
    ("a/b/l", "nowhere/f"): "nowhere/f",
    ("a/b/l", "."): ".",
    ("a/b/l", ".."): "..",
    ("a/b/l", "../.."): "../..",
    ("a/b/l", "../../d/f"): "../../d/f",
    ("a/b/l", "./.././../d"): "./.././../d",
    ("a/b/l", "../../.."): None,
    ("a/b/l", "../../../other/f"): None,
    ("l", ".."): None,
    ("l", "../ns/a"): None,
    ("l", "a/../d/f"): "d/f",
    ("a/b/l", "c/../f"): "../../a/b/f",
    ("a/b/l", "c/../../../d/"): "../../d/",
    ("a/b/l", "c/../../../../d"): None,
    ("a/b/l", "c/../../../d/../.."): None,
    ("a/b/l", "none/../f"): "../../a/b/f",
    ("l", "/etc/passwd"): None,
    ("l", "/"): None,
    ("l", "//etc/passwd"): None,
    ("l", "/srv/data"): ".",
    ("l", "/srv/data/d/f"): "d/f",
    ("l", "/srv/./data//d/f"): "d/f",
    ("a/b/l", "/srv/data/a/b/f"): "../../a/b/f",
    ("a/b/l", "/gpfs/data/d"): "../../d",
    ("a/b/l", "/srv/data"): "../..",
    ("l", "/srv/database"): None,
    ("l", "/srv"): None,
    ("l", "/srv/data/../data/f"): None,
    ("l", "/srv/data/a/../d"): "d",
    ("l", "/srv/data/a/../.."): None,
    ("l", "/home/me/mnt/ns/d/f"): "d/f",
    ("a/l", "/home/me/mnt/ns"): "..",
    ("l", "/home/me/mnt/other/f"): None,
    ("l", "/home/me/mnt"): None,
    ("l", "/home/me/.bashrc"): None,
}


@pytest.mark.parametrize("kind", KINDS)
def test_links_lead_to_what_is_in_the_namespace(tmp_path: Path, kind: str) -> None:
    async def story(w: World) -> None:
        await planted(w)
        for (path, target), wanted in CASES.items():
            await w.remote.make_symlink(path.encode(), target.encode())
            found = await target_of(w, f"ns/{path}")
            assert found == (None if wanted is None else wanted.encode()), (path, target)
            await w.remote.remove(path.encode())
            w.clock.expire_attributes()

    run(tmp_path, kind, story)


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_that_leads_upwards_does_not_help_another_out(tmp_path: Path, kind: str) -> None:
    """The kernel takes ".." from where a link led, which may be higher than where the link is: by
    their texts alone all of these stay inside."""

    async def story(w: World) -> None:
        await planted(
            w,
            ("a/b/c/top", "../../.."),
            ("a/b/c/out", "top/../etc"),
            ("a/b/c/far", "top/a/b/c/top/.."),
            ("a/b/c/in", "top/a/../d"),
            ("a/b/c/abs", "/srv/data"),
            ("a/b/c/abs-out", "abs/.."),
            ("a/b/c/abs-in", "abs/a/../d/f"),
            ("a/b/c/etc", "/etc"),
            ("a/b/c/through", "etc/../home"),
        )
        for out in ("out", "far", "abs-out", "through"):
            assert await target_of(w, f"ns/a/b/c/{out}") is None
        assert await target_of(w, "ns/a/b/c/in") == b"../../../d"
        assert await target_of(w, "ns/a/b/c/abs-in") == b"../../../d/f"

    run(tmp_path, kind, story)


def test_links_in_circles_end(tmp_path: Path) -> None:
    async def story(w: World) -> None:
        await planted(
            w, ("x", "y/../f"), ("y", "x/../f"), ("z", "z/.."), ("long", "z/" * 500 + "..")
        )
        for name in ("x", "y", "z", "long"):
            assert await target_of(w, f"ns/{name}") is None

    run(tmp_path, "sftp", story)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_a_server_tells_the_kernel_stays_in_the_namespace(
    tmp_path: Path, seed: int
) -> None:
    """Random trees of links, walked as the kernel walks: ".." physically, links by what is
    answered."""
    rnd = random.Random(seed)
    places = ["", "a", "a/b", "a/b/c", "d"]
    names = ["a", "b", "c", "d", "..", "..", ".", "l0", "l1", "l2", "l3", "l4", "l5", "none"]

    async def story(w: World) -> None:
        links = []
        for number in range(6):
            parts = rnd.choices(names, k=rnd.randint(1, 6))
            start = rnd.choice(["", "", "", "/", "/srv/data/", "/home/me/mnt/ns/"])
            links.append(
                (posixpath.join(rnd.choice(places), f"l{number}"), start + "/".join(parts))
            )
        await planted(w, *links)
        contained = 0
        for path, _ in links:
            contained += await walk(w, path)
        assert contained <= len(links)

    async def walk(w: World, path: str) -> bool:
        """As path_walk(7): raises AssertionError where it gets out of the namespace."""
        todo, at, followed = path.split("/"), w.fs.tree.root, 0
        at = await w.kernel.walk("ns")
        while todo:
            part = todo.pop(0)
            if part in ("", "."):
                continue
            if part == "..":
                assert not at.is_namespace_root, (path, "got out")
                assert at.parent is not None
                at = at.parent
                continue
            try:
                child = await w.fs.lookup.find(at.ino, part.encode())
            except NotFound:
                return True
            w.fs.tree.count_lookup(child)
            if child.is_link:
                followed += 1
                if followed > 40:
                    return True
                try:
                    target = (await w.fs.readlink(child.ino)).decode()
                except LeadsOut:
                    return False
                assert not target.startswith("/"), (path, target)
                todo = [*target.split("/"), *todo]
            elif child.is_directory:
                at = child
            else:
                return True
        return True

    run(tmp_path, "sftp", story)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_made_here_reads_as_it_was_made(tmp_path: Path, kind: str) -> None:
    """As long as it is the very same link; also under a new name."""

    async def story(w: World) -> None:
        await w.kernel.mkdir("ns/d")
        await w.kernel.symlink("ns/d/l", b"/etc/hosts")
        assert await target_of(w, "ns/d/l") == b"/etc/hosts"
        await w.kernel.rename("ns/d", "ns/e")
        assert await target_of(w, "ns/e/l") == b"/etc/hosts"
        await w.kernel.rename("ns/e/l", "ns/m")
        assert await target_of(w, "ns/m") == b"/etc/hosts"
        await w.remote.remove(b"m")
        await w.remote.make_symlink(b"m", b"/etc/shadow")
        w.clock.expire_attributes()
        assert await target_of(w, "ns/m") is None

    run(tmp_path, kind, story)


def test_a_link_with_two_names_leads_nowhere_from_either(tmp_path: Path) -> None:
    """Of one inode the kernel may take ".." from either directory."""

    async def story(w: World) -> None:
        await planted(w, ("a/b/l", "../../d"), ("a/b/plain", "f"))
        for name in ("l", "plain"):
            node = await w.kernel.walk(f"ns/a/b/{name}")
            top = await w.kernel.walk("ns/d")
            w.fs.tree.add_name(node, top, name.encode())
        assert await target_of(w, "ns/a/b/l") is None
        assert await target_of(w, "ns/a/b/plain") == b"f"

    run(tmp_path, "sftp", story)


@pytest.mark.parametrize("kind", KINDS)
def test_follow_leaves_targets_as_they_are(tmp_path: Path, kind: str) -> None:
    async def story(w: World) -> None:
        await planted(w)
        for path, target in CASES:
            await w.remote.make_symlink(path.encode(), target.encode())
            assert await target_of(w, f"ns/{path}") == target.encode()
            await w.remote.remove(path.encode())
            w.clock.expire_attributes()

    run(tmp_path, kind, story, "follow")


@pytest.mark.parametrize("kind", KINDS)
def test_hide_shows_none_and_makes_none(tmp_path: Path, kind: str) -> None:
    async def story(w: World) -> None:
        await planted(w, ("l", "a"), ("a/l", "b"))
        assert sorted(await w.kernel.listdir("ns")) == [b"a", b"d"]
        with pytest.raises(NotFound):
            await w.kernel.walk("ns/l")
        assert not await w.kernel.exists("ns/a/l")
        with pytest.raises(NoSuchKind):
            await w.kernel.symlink("ns/new", b"a")
        with pytest.raises((AlreadyExists, AlreadyExists)):
            await w.kernel.mkdir("ns/l")

    run(tmp_path, kind, story, "hide")
