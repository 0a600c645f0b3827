//! Several processes on one castore. The test binary starts itself as the other process.

use super::*;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

const CHILD_DIR: &str = "UNDERSTORY_TEST_CASTORE";

/// Not a test by itself: for each line with a number it stores a file, syncs, and says so.
#[test]
fn child_process() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else {
        return;
    };
    let castore = Castore::open(Path::new(&dir), &options()).unwrap();
    let writer = castore.writer().unwrap();
    for line in std::io::stdin().lock().lines() {
        let seed: u64 = line.unwrap().parse().unwrap();
        put_file(&writer, &content(seed));
        writer.sync().unwrap();
        println!("stored {seed}");
        std::io::stdout().flush().unwrap();
    }
}

fn options() -> OpenOptions {
    OpenOptions {
        pack_bytes_max: 60_000,
        compress_threads: 2,
        ..OpenOptions::default()
    }
}

fn content(seed: u64) -> Vec<u8> {
    let len = if seed.is_multiple_of(5) {
        300_000
    } else {
        10_000
    };
    noise(seed, len)
}

struct Other {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Other {
    fn start(dir: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "tests::processes::child_process", "--nocapture"])
            .env(CHILD_DIR, dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            stdin: child.stdin.take().unwrap(),
            stdout: BufReader::new(child.stdout.take().unwrap()),
            child,
        }
    }

    fn order(&mut self, seed: u64) {
        writeln!(self.stdin, "{seed}").unwrap();
    }

    /// Waits until it says that it has stored something.
    fn stored(&mut self) -> u64 {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(self.stdout.read_line(&mut line).unwrap() > 0, "it ended");
            // The harness writes to the same stream.
            if let Some(at) = line.find("stored ") {
                return line[at + 7..].trim().parse().unwrap();
            }
        }
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn assert_stored(castore: &Castore, seed: u64) {
    let data = content(seed);
    let node = Node::File {
        digest: Digest::of(&data),
        size: data.len() as u64,
        executable: false,
    };
    assert_file(castore, &node, &data);
}

#[test]
fn what_another_process_has_synced_is_seen_at_once() {
    let dir = tempfile::tempdir().unwrap();
    Castore::create(dir.path()).unwrap();
    let castore = Castore::open(dir.path(), &options()).unwrap();
    let mut others = [Other::start(dir.path()), Other::start(dir.path())];
    let writer = castore.writer().unwrap();
    for round in 0..15 {
        // All three write at the same time, some of it the same.
        for (number, other) in others.iter_mut().enumerate() {
            other.order(round * 3 + number as u64);
        }
        put_file(&writer, &content(round * 3 + 1));
        put_file(&writer, &content(round * 3 + 2));
        writer.sync().unwrap();
        for other in &mut others {
            let seed = other.stored();
            assert_stored(&castore, seed);
        }
    }
    for seed in 0..45 {
        assert_stored(&castore, seed);
    }
    // Left out because the others have it: nothing new is stored.
    let before = writer.counters().new_bytes;
    for seed in 0..45 {
        put_file(&writer, &content(seed));
    }
    writer.sync().unwrap();
    assert_eq!(writer.counters().new_bytes, before);
    for other in others {
        other.kill();
    }
    assert_eq!(damage(&castore), Vec::<String>::new());
}

#[test]
fn a_killed_writers_pack_is_continued() {
    let dir = tempfile::tempdir().unwrap();
    Castore::create(dir.path()).unwrap();
    let mut acknowledged = Vec::new();
    for round in 0..12_u64 {
        let mut other = Other::start(dir.path());
        for seed in round * 10..round * 10 + 9 {
            other.order(seed);
        }
        // Killed in the middle of its work.
        for _ in 0..=round % 5 {
            acknowledged.push(other.stored());
        }
        other.kill();
    }
    let castore = Castore::open(dir.path(), &OpenOptions::default()).unwrap();
    let open = || castore.core().state().open.len();
    assert!(
        open() <= 1,
        "each took over from the one before: {}",
        open()
    );
    let packs = castore.stats().unwrap().packs;
    let writer = castore.writer().unwrap();
    put_file(&writer, b"one more");
    writer.sync().unwrap();
    assert!(castore.stats().unwrap().packs <= packs + 1);
    for seed in acknowledged {
        assert_stored(&castore, seed);
    }
    assert_eq!(damage(&castore), Vec::<String>::new());
}

#[test]
fn two_castores_of_one_process_do_not_share_a_pack() {
    let (dir, first) = fresh();
    let second = open(dir.path());
    let (one, two) = (first.writer().unwrap(), second.writer().unwrap());
    let a = put_file(&one, &noise(1, 1000));
    let b = put_file(&two, &noise(2, 1000));
    one.sync().unwrap();
    two.sync().unwrap();
    for castore in [&first, &second] {
        assert_file(castore, &a, &noise(1, 1000));
        assert_file(castore, &b, &noise(2, 1000));
    }
    assert_eq!(first.stats().unwrap().packs, 2);
    // Dropped writers leave packs that are taken up again.
    drop((one, two, first, second));
    let castore = open(dir.path());
    let writer = castore.writer().unwrap();
    let c = put_file(&writer, &noise(3, 1000));
    writer.sync().unwrap();
    assert_eq!(castore.stats().unwrap().packs, 2);
    for (node, seed) in [(&a, 1), (&b, 2), (&c, 3)] {
        assert_file(&castore, node, &noise(seed, 1000));
    }
}

#[test]
fn what_another_process_has_not_published_yet_stays_until_it_ends() {
    use crate::store::CollectOptions;
    use std::time::Duration;
    let dir = tempfile::tempdir().unwrap();
    Castore::create(dir.path()).unwrap();
    let castore = Castore::open(dir.path(), &options()).unwrap();
    let writer = castore.writer().unwrap();
    // Stored here, published, and found by the other: then it is no root any more.
    for seed in 1..20 {
        let node = put_file(&writer, &content(seed));
        castore.release(&node);
    }
    writer.sync().unwrap();
    let mut other = Other::start(dir.path());
    for seed in 10..30 {
        other.order(seed);
    }
    for _ in 10..30 {
        other.stored();
    }
    let now = CollectOptions {
        dead_permille_min: 1,
        lease_wait: Duration::ZERO,
        pack_wait: Duration::ZERO,
        ..CollectOptions::default()
    };
    let collect = || {
        castore
            .collect(&mut |_| Ok(()), &now, &mut |_| Ok::<_, CastoreError>(()))
            .unwrap()
    };
    let report = collect();
    assert!(report.kept_leased.packs > 0, "{report:?}");
    assert!(
        report.packs_deleted > 0,
        "what nobody relies on goes: {report:?}"
    );
    for seed in 10..30 {
        assert_stored(&castore, seed);
    }
    other.kill();
    let report = collect();
    assert_eq!(report.kept_leased.packs, 0, "{report:?}");
    assert_eq!(castore.stats().unwrap().data_pieces, 0);
    let leases = crate::core::list_names(&dir.path().join("leases")).unwrap();
    assert_eq!(leases, Vec::<String>::new());
}
