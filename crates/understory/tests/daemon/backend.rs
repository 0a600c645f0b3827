//! What only a backend made for it shows: messages that come while an operation runs, clients that vanish
//! meanwhile, archives that are not wanted.

use crate::support::{Daemon, VERSIONS, file_nar, info, path, server_error};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use understory::add::AddMethod;
use understory::daemon::{
    Activity, AddOptions, Backend, Client, ClientInfo, ClientOptions, NarWriter, Operations,
    PathSource, Reporter, Server, ServerOptions,
};
use understory::store::GcReport;
use understory::{Error, Result};
use understory_nix::worker::{
    ActivityType, BasicDerivation, BuildMode, BuildResult, Decoder, DerivedPath, DrvOutput,
    Encoder, Field, GcRequest, KeyedBuildResult, LogMessage, MissingInfo, Request, ResultType,
    SetOptions, SubstitutablePathInfo, Verbosity, Version, WireRealisation,
};
use understory_nix::{ContentAddress, PathInfo, Signature, StoreDir, StorePath};

const LONG: Duration = Duration::from_secs(20);

type Work = dyn Fn(&dyn Reporter) -> Result<()> + Send + Sync;

/// Does `work` where something is added, optimised or substituted.
#[derive(Clone)]
struct Fake {
    dir: StoreDir,
    work: Arc<Work>,
    seen: Arc<Mutex<Vec<String>>>,
    refuses: bool,
}

impl Fake {
    fn new(work: impl Fn(&dyn Reporter) -> Result<()> + Send + Sync + 'static) -> Self {
        Self {
            dir: StoreDir::default(),
            work: Arc::new(work),
            seen: Arc::default(),
            refuses: false,
        }
    }
    fn serve(&self) -> Daemon {
        let backend = Arc::new(self.clone());
        Daemon::serving(|_| Server::for_backend(backend, ServerOptions::default()))
    }
    fn saw(&self, what: impl Into<String>) {
        self.seen.lock().unwrap().push(what.into());
    }
}

impl Backend for Fake {
    fn store_dir(&self) -> &StoreDir {
        &self.dir
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn connect(&self, client: &ClientInfo) -> Result<Box<dyn Operations>> {
        // Nobody knows who is at the other end of standard input.
        let us = std::process::id().cast_signed();
        let stdio = std::env::var_os("UNDERSTORY_TEST_STDIO").is_some();
        assert_eq!(client.pid, (!stdio).then_some(us));
        if self.refuses {
            return Err(Error::environment("the lower store is not there").with_hint("start it"));
        }
        Ok(Box::new(self.clone()))
    }
}

fn not_here<T>() -> Result<T> {
    Err(Error::internal("no test asks for this"))
}

impl Operations for Fake {
    fn set_options(&self, _: &SetOptions) -> Result<()> {
        Ok(())
    }
    fn is_valid(&self, _: &StorePath) -> Result<bool> {
        Ok(false)
    }
    fn with_path_info(&self, _: &StorePath, _: &mut dyn FnMut(&PathInfo)) -> Result<bool> {
        Ok(false)
    }
    fn valid_paths(
        &self,
        paths: &[StorePath],
        substitute: bool,
        _: &dyn Reporter,
    ) -> Result<Vec<StorePath>> {
        Ok(if substitute {
            paths.to_vec()
        } else {
            Vec::new()
        })
    }
    fn all_valid_paths(&self) -> Result<Vec<StorePath>> {
        not_here()
    }
    fn referrers(&self, _: &StorePath) -> Result<BTreeSet<StorePath>> {
        not_here()
    }
    fn valid_derivers(&self, _: &StorePath) -> Result<BTreeSet<StorePath>> {
        not_here()
    }
    fn path_from_hash_part(&self, _: &str) -> Result<Option<StorePath>> {
        not_here()
    }
    fn derivation_output_map(&self, _: &StorePath) -> Result<BTreeMap<String, Option<StorePath>>> {
        not_here()
    }
    fn realisation(&self, _: &DrvOutput) -> Result<Option<WireRealisation>> {
        not_here()
    }
    fn nar<'a>(&'a self, _: &StorePath) -> Result<NarWriter<'a>> {
        not_here()
    }
    fn add_nar(
        &self,
        info: PathInfo,
        archive: &mut dyn BufRead,
        options: AddOptions,
        reporter: &dyn Reporter,
    ) -> Result<()> {
        self.saw(format!("{} {}", info.path.name(), options.check_signatures));
        (self.work)(reporter)?;
        let mut bytes = vec![0; usize::try_from(info.nar_size).unwrap()];
        archive.read_exact(&mut bytes).unwrap();
        Ok(())
    }
    fn add_multiple(
        &self,
        source: &mut dyn PathSource,
        _: AddOptions,
        _: &dyn Reporter,
    ) -> Result<()> {
        while let Some(info) = source.next()? {
            assert!(!info.ultimate);
            // Every other is not wanted.
            let number = self.seen.lock().unwrap().len();
            let mut bytes = Vec::new();
            if number % 2 == 1 {
                bytes.resize(usize::try_from(info.nar_size).unwrap(), 0);
                source.archive().read_exact(&mut bytes).unwrap();
            }
            self.saw(format!("{} {}", info.path.name(), bytes.len()));
        }
        Ok(())
    }
    fn add_dump(
        &self,
        _: &str,
        _: &AddMethod,
        _: &BTreeSet<StorePath>,
        _: bool,
        _: &mut dyn BufRead,
        _: &dyn Reporter,
    ) -> Result<PathInfo> {
        not_here()
    }
    fn add_build_log(&self, _: &StorePath, _: &mut dyn Read) -> Result<()> {
        not_here()
    }
    fn add_signatures(&self, _: &StorePath, _: &BTreeSet<Signature>) -> Result<()> {
        not_here()
    }
    fn register_realisation(&self, _: &WireRealisation) -> Result<()> {
        not_here()
    }
    fn add_temp_root(&self, _: &StorePath) -> Result<()> {
        not_here()
    }
    fn add_indirect_root(&self, _: &Path) -> Result<()> {
        not_here()
    }
    fn add_perm_root(&self, _: &StorePath, _: &Path) -> Result<()> {
        not_here()
    }
    fn roots(&self) -> Result<Vec<(PathBuf, StorePath)>> {
        not_here()
    }
    fn collect_garbage(&self, _: &GcRequest, _: &dyn Reporter) -> Result<GcReport> {
        not_here()
    }
    fn verify(&self, check_contents: bool, repair: bool, _: &dyn Reporter) -> Result<bool> {
        self.saw(format!("verify {check_contents} {repair}"));
        Ok(false)
    }
    fn optimise(&self, reporter: &dyn Reporter) -> Result<()> {
        (self.work)(reporter)
    }
    fn query_missing(&self, _: &[DerivedPath], _: &dyn Reporter) -> Result<MissingInfo> {
        not_here()
    }
    fn ensure_path(&self, _: &StorePath, reporter: &dyn Reporter) -> Result<()> {
        (self.work)(reporter)
    }
    fn build_paths(&self, _: &[DerivedPath], _: BuildMode, _: &dyn Reporter) -> Result<()> {
        not_here()
    }
    fn build_paths_with_results(
        &self,
        _: &[DerivedPath],
        _: BuildMode,
        _: bool,
        _: &dyn Reporter,
    ) -> Result<Vec<KeyedBuildResult>> {
        not_here()
    }
    fn build_derivation(
        &self,
        _: &StorePath,
        _: &BasicDerivation,
        _: BuildMode,
        _: bool,
        _: &dyn Reporter,
    ) -> Result<BuildResult> {
        not_here()
    }
    fn substitutable_paths(&self, paths: &[StorePath], _: &dyn Reporter) -> Result<Vec<StorePath>> {
        Ok(paths
            .iter()
            .filter(|path| path.name() == "there")
            .cloned()
            .collect())
    }
    fn substitutable_path_infos(
        &self,
        paths: &BTreeMap<StorePath, Option<ContentAddress>>,
        _: &dyn Reporter,
    ) -> Result<Vec<(StorePath, SubstitutablePathInfo)>> {
        Ok(paths
            .keys()
            .filter(|path| path.name() == "there")
            .map(|path| (path.clone(), substitutable()))
            .collect())
    }
}

fn substitutable() -> SubstitutablePathInfo {
    SubstitutablePathInfo {
        deriver: Some(path("there.drv")),
        references: BTreeSet::from([path("else")]),
        download_size: 7,
        nar_size: 9,
    }
}

/// Sends a request and leaves its reply to be read.
fn throw(client: &mut Client, request: &Request) {
    let mut whole = Encoder::new(Vec::new(), StoreDir::default(), client.protocol());
    request.write(&mut whole).unwrap();
    client.stream().write_all(&whole.into_inner()).unwrap();
}

fn messages(client: &mut Client) -> Decoder<BufReader<std::os::unix::net::UnixStream>> {
    let protocol = client.protocol();
    let stream = client.stream().try_clone().unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    Decoder::new(BufReader::new(stream), StoreDir::default(), protocol, None)
}

#[test]
fn messages_arrive_while_the_operation_runs_from_every_thread() {
    let (heard, hearing): (Sender<()>, Receiver<()>) = channel();
    let hearing = Mutex::new(hearing);
    let fake = Fake::new(move |reporter| {
        reporter.say(Verbosity::Error, "begun");
        // Only a client that has been told can say so.
        hearing.lock().unwrap().recv_timeout(LONG).unwrap();
        let whole = Activity::start(
            reporter,
            Verbosity::Info,
            ActivityType::OptimiseStore,
            "all",
            Vec::new(),
            0,
        );
        std::thread::scope(|scope| {
            for number in 0..8_u64 {
                let parent = whole.id();
                scope.spawn(move || {
                    let text = number.to_string().repeat(3_000);
                    let fields = vec![Field::Text(text.clone().into()), Field::Int(number)];
                    let activity = Activity::start(
                        reporter,
                        Verbosity::Talkative,
                        ActivityType::CopyPath,
                        &text,
                        fields,
                        parent,
                    );
                    for step in 0..50 {
                        activity.progress(step, 50, 1, 0);
                        reporter.say(Verbosity::Error, &text);
                    }
                });
            }
        });
        Ok(())
    });
    let daemon = fake.serve();
    let mut client = daemon.client();
    throw(&mut client, &Request::OptimiseStore);
    let mut decoder = messages(&mut client);
    let next = |decoder: &mut _| LogMessage::read(decoder).unwrap();
    assert_eq!(next(&mut decoder), LogMessage::Next(b"begun\n".to_vec()));
    heard.send(()).unwrap();
    let (mut started, mut stopped, mut lines, mut results) =
        (BTreeSet::new(), BTreeSet::new(), 0, 0);
    loop {
        match next(&mut decoder) {
            LogMessage::Last => break,
            LogMessage::Next(text) => {
                assert_eq!(text.len(), 3_001);
                assert!(text[..3_000].iter().all(|byte| *byte == text[0]));
                lines += 1;
            }
            LogMessage::StartActivity { id, .. } => assert!(started.insert(id), "ids are unique"),
            LogMessage::StopActivity(id) => assert!(stopped.insert(id)),
            LogMessage::Result { id, result, fields } => {
                assert!(started.contains(&id) && !stopped.contains(&id));
                assert_eq!((result, fields.len()), (ResultType::Progress, 4));
                results += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(decoder.u64().unwrap(), 1);
    assert_eq!((lines, results, started.len()), (400, 400, 9));
    assert_eq!(started, stopped);
}

#[test]
fn clients_hear_what_they_want_to_hear() {
    let fake = Fake::new(|reporter| {
        for level in [Verbosity::Error, Verbosity::Info, Verbosity::Debug] {
            reporter.say(level, &format!("{level:?}"));
        }
        Ok(())
    });
    let daemon = fake.serve();
    let mut client = daemon.client();
    for (verbosity, expected) in [(0, "Error\n"), (3, "Error\nInfo\n")] {
        client
            .set_options(SetOptions {
                verbosity,
                ..SetOptions::default()
            })
            .unwrap();
        assert_eq!(client.number(&Request::OptimiseStore).unwrap(), 1);
        let heard: Vec<u8> = client
            .take_logs()
            .into_iter()
            .flat_map(|log| match log {
                LogMessage::Next(text) => text,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(String::from_utf8(heard).unwrap(), expected);
    }
}

/// Tells what ended its wait.
fn waits_for_cancellation() -> (Fake, Receiver<String>) {
    let (begun_or_done, events) = channel();
    let begun_or_done = Mutex::new(begun_or_done);
    let fake = Fake::new(move |reporter| {
        let say = |what: String| begun_or_done.lock().unwrap().send(what).unwrap();
        say("begun".to_owned());
        let start = Instant::now();
        loop {
            if let Err(error) = reporter.check() {
                say(error.to_string());
                return Err(error);
            }
            assert!(start.elapsed() < LONG, "never cancelled");
            std::thread::yield_now();
        }
    });
    (fake, events)
}

#[test]
fn an_operation_ends_when_its_client_has_gone() {
    let (fake, events) = waits_for_cancellation();
    let daemon = fake.serve();
    for request in [Request::OptimiseStore, Request::EnsurePath(path("a"))] {
        let mut client = daemon.client();
        throw(&mut client, &request);
        assert_eq!(events.recv_timeout(LONG).unwrap(), "begun");
        drop(client);
        assert_eq!(
            events.recv_timeout(LONG).unwrap(),
            "interrupted by the user"
        );
        daemon.wait_until_alone();
    }
}

#[test]
fn an_upload_ends_when_its_client_has_gone() {
    let (fake, events) = waits_for_cancellation();
    let daemon = fake.serve();
    let archive = file_nar(b"contents");
    for minor in [21, 23, 38] {
        let mut client = daemon.client_at(Version::new(1, minor));
        throw(
            &mut client,
            &Request::AddToStoreNar {
                info: Box::new(info(&path("a"), &archive, &[])),
                repair: false,
                dont_check_sigs: true,
            },
        );
        assert_eq!(events.recv_timeout(LONG).unwrap(), "begun");
        drop(client);
        assert_eq!(
            events.recv_timeout(LONG).unwrap(),
            "interrupted by the user"
        );
        daemon.wait_until_alone();
    }
}

#[test]
fn an_operation_ends_when_the_server_stops() {
    let (fake, events) = waits_for_cancellation();
    let mut daemon = Daemon::serving(|_| {
        let options = ServerOptions {
            grace_ms_max: 1,
            ..ServerOptions::default()
        };
        Server::for_backend(Arc::new(fake), options)
    });
    let mut client = daemon.client();
    throw(&mut client, &Request::OptimiseStore);
    assert_eq!(events.recv_timeout(LONG).unwrap(), "begun");
    daemon.stop();
    assert_eq!(
        events.recv_timeout(LONG).unwrap(),
        "interrupted by the user"
    );
}

#[test]
fn a_refused_upload_may_have_said_something_and_the_connection_goes_on() {
    let fake = Fake::new(|reporter| {
        reporter.say(Verbosity::Error, "this will not do");
        Err(Error::user("no"))
    });
    let daemon = fake.serve();
    // More than the socket holds: the client is still sending when it is told.
    let archive = file_nar(&vec![7; 4 << 20]);
    for version in VERSIONS {
        let mut client = daemon.client_at(version);
        for _ in 0..2 {
            let info = info(&path("a"), &archive, &[]);
            let answer = client.add_to_store_nar(&info, &mut &archive[..], false, true);
            assert_eq!(server_error(answer), "no");
            assert_eq!(
                client.take_logs(),
                [LogMessage::Next(b"this will not do\n".to_vec())]
            );
        }
    }
    assert_eq!(fake.seen.lock().unwrap().len(), 2 * VERSIONS.len());
    assert!(
        fake.seen
            .lock()
            .unwrap()
            .iter()
            .all(|seen| seen == "a false")
    );
}

#[test]
fn an_upload_goes_on_while_the_server_says_something() {
    let fake = Fake::new(|reporter| {
        for _ in 0..100 {
            reporter.say(Verbosity::Error, &"waiting ".repeat(100));
        }
        Ok(())
    });
    let daemon = fake.serve();
    let archive = file_nar(&vec![7; 4 << 20]);
    for version in VERSIONS {
        let mut client = daemon.client_at(version);
        let info = info(&path("a"), &archive, &[]);
        client
            .add_to_store_nar(&info, &mut &archive[..], false, true)
            .unwrap();
        assert_eq!(client.take_logs().len(), 100);
        assert!(!client.is_valid_path(&info.path).unwrap());
    }
}

#[test]
fn archives_that_are_not_wanted_are_skipped() {
    let fake = Fake::new(|_| Ok(()));
    let daemon = fake.serve();
    let mut client = daemon.client();
    let archives: Vec<Vec<u8>> = (0..5).map(|n| file_nar(&vec![n; 1_000])).collect();
    client
        .add_multiple_to_store(5, false, true, |out| {
            for (number, archive) in archives.iter().enumerate() {
                let mut info = info(&path(&number.to_string()), archive, &[]);
                info.ultimate = true;
                understory::daemon::client::write_info(out, &StoreDir::default(), &info)?;
                out.write_all(archive)?;
            }
            Ok(())
        })
        .unwrap();
    let size = archives[0].len();
    let read = format!("1 {size}");
    let read3 = format!("3 {size}");
    assert_eq!(
        *fake.seen.lock().unwrap(),
        ["0 0", read.as_str(), "2 0", read3.as_str(), "4 0"]
    );
    assert!(!client.is_valid_path(&path("a")).unwrap());
}

#[test]
fn a_store_that_cannot_be_opened_is_an_error_of_the_handshake() {
    let mut fake = Fake::new(|_| Ok(()));
    fake.refuses = true;
    let daemon = fake.serve();
    for version in VERSIONS {
        let options = ClientOptions {
            version,
            lix_order: true,
            ..ClientOptions::default()
        };
        assert_eq!(
            server_error(Client::connect(&daemon.socket, &options).map(drop)),
            "the lower store is not there\nhint: start it"
        );
    }
}

#[test]
fn what_can_be_substituted_is_told_at_every_version() {
    let daemon = Fake::new(|_| Ok(())).serve();
    let (there, missing) = (path("there"), path("missing"));
    for version in VERSIONS {
        let mut client = daemon.client_at(version);
        let both = vec![missing.clone(), there.clone()];
        assert_eq!(
            client
                .paths(&Request::QuerySubstitutablePaths(both.clone()))
                .unwrap(),
            BTreeSet::from([there.clone()])
        );
        let infos = both.iter().map(|path| (path.clone(), None)).collect();
        assert_eq!(
            client
                .query_substitutable_path_infos(&Request::QuerySubstitutablePathInfos(infos))
                .unwrap(),
            [(there.clone(), substitutable())]
        );
        for (path, expected) in [(&there, 1), (&missing, 0)] {
            let request = Request::HasSubstitutes(path.clone());
            assert_eq!(client.number(&request).unwrap(), expected);
        }
        let request = Request::QuerySubstitutablePathInfo(missing.clone());
        assert_eq!(client.number(&request).unwrap(), 0);
        let valid = Request::QueryValidPaths {
            paths: vec![there.clone()],
            substitute: true,
        };
        let passed_on = version.minor() >= 27;
        assert_eq!(client.paths(&valid).unwrap().len(), usize::from(passed_on));
        // Last: its reply is read by hand.
        throw(
            &mut client,
            &Request::QuerySubstitutablePathInfo(there.clone()),
        );
        let mut decoder = messages(&mut client);
        assert_eq!(LogMessage::read(&mut decoder).unwrap(), LogMessage::Last);
        assert_eq!(decoder.u64().unwrap(), 1);
        assert_eq!(
            SubstitutablePathInfo::read(&mut decoder).unwrap(),
            substitutable()
        );
    }
}

#[test]
fn repairs_reach_the_store_of_peers_with_trust() {
    let fake = Fake::new(|_| Ok(()));
    let daemon = fake.serve();
    let request = Request::VerifyStore {
        check_contents: true,
        repair: true,
    };
    assert_eq!(daemon.client().number(&request).unwrap(), 0);
    assert_eq!(*fake.seen.lock().unwrap(), ["verify true true"]);
}

/// Not a test of its own: what the next one starts as another process.
#[test]
fn helper_that_serves_standard_input() {
    let Some(dir) = std::env::var_os("UNDERSTORY_TEST_STDIO") else {
        return;
    };
    let dir = PathBuf::from(dir);
    let (fake, events) = waits_for_cancellation();
    let heard = std::thread::spawn(move || {
        for event in events {
            std::fs::write(dir.join(event), "").unwrap();
        }
    });
    let backend = Arc::new(fake);
    let server = Server::for_backend(backend, ServerOptions::default());
    server.serve_stdio().unwrap();
    drop(server);
    heard.join().unwrap();
}

#[test]
fn an_operation_ends_when_standard_input_hangs_up() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "backend::helper_that_serves_standard_input"])
        .env("UNDERSTORY_TEST_STDIO", dir.path())
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    // The greeting of protocol 1.35, then OptimiseStore.
    let words: [u64; 5] = [0x6e69_7863, 0x123, 0, 0, 34];
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let mut input = child.stdin.take().unwrap();
    input.write_all(&bytes).unwrap();
    let start = Instant::now();
    while !dir.path().join("begun").exists() {
        assert!(start.elapsed() < LONG, "never begun");
        std::thread::yield_now();
    }
    drop(input);
    child.wait().unwrap();
    assert!(dir.path().join("interrupted by the user").exists());
}
