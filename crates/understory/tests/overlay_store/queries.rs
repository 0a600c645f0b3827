//! What the overlay store answers, from above and below.

use super::common::archive;
use super::support::{UNSIGNED, World, add, add_text};
use std::collections::BTreeSet;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::Ordering;
use understory::daemon::Silent;
use understory_nix::worker::{DrvOutput, WireRealisation};
use understory_nix::{ContentAddressMethod, Hash, HashAlgorithm, PathInfo, StoreDir, StorePath};

#[test]
fn row_07_outputs_of_a_derivation_that_only_the_lower_knows() {
    let Some(w) = World::castore() else { return };
    let text = br#"Derive([("out","/nix/store/zz9b80z1dkf8zbi8zhmk3cnz9c3hv5hy-fixed","sha256","ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")],[],[],"builtin","builtin:fetchurl",[],[("out","/nix/store/zz9b80z1dkf8zbi8zhmk3cnz9c3hv5hy-fixed")])"#;
    let text = String::from_utf8(text.to_vec()).unwrap();
    // The path that this output really has.
    let ca = understory_nix::ContentAddress {
        method: ContentAddressMethod::Flat,
        hash: Hash::of(HashAlgorithm::Sha256, b"abc"),
    };
    let name = understory_nix::StorePathName::new("fixed").unwrap();
    let output = ca
        .make_path(
            &StoreDir::default(),
            &name,
            &understory_nix::content_address::References {
                others: BTreeSet::new(),
                itself: false,
            },
        )
        .unwrap();
    let text = text.replace("zz9b80z1dkf8zbi8zhmk3cnz9c3hv5hy-fixed", output.base_name());
    let drv = w.below("fixed.drv", &text, &[]);
    let client = w.client();
    let map = client.derivation_output_map(&drv).unwrap();
    assert_eq!(map, [("out".to_owned(), Some(output.clone()))].into());
    assert_eq!(
        client.valid_derivers(&output).unwrap(),
        [drv.clone()].into()
    );
    let absent = archive("absent.drv", "", &[]).0.path;
    let error = client.derivation_output_map(&absent).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("path '/nix/store/{absent}' is not valid")
    );
    // Referred to from above it comes into U with its outputs.
    add_text(&*client, "above", "of it", &[&drv]).unwrap();
    assert_eq!(client.valid_derivers(&output).unwrap(), [drv].into());
}

#[test]
fn row_08_clients_see_all_paths_of_both() {
    let Some(w) = World::castore() else { return };
    let lower = w.below("lower", "text", &[]);
    let client = w.client();
    let upper = add_text(&*client, "upper", "text", &[]).unwrap().path;
    let all: BTreeSet<StorePath> = client.all_valid_paths().unwrap().into_iter().collect();
    assert_eq!(all, [lower, upper].into());
}

#[test]
fn row_09_realisations_of_both() {
    let Some((w, lowers)) = World::plain(1) else {
        return;
    };
    let leaf = archive("leaf", "leaf", &[]);
    let top = archive("top", "top", &[&leaf.0.path]);
    let other = archive("other", "other", &[]);
    for path in [&leaf, &top, &other] {
        lowers[0].add(path);
    }
    let id = DrvOutput::Hash(format!("sha256:{}!out", "0".repeat(64)));
    let realisation = |path: &StorePath, signature: &str| WireRealisation {
        id: id.clone(),
        out_path: path.clone(),
        signatures: [signature.to_owned()].into(),
    };
    let below = realisation(&top.0.path, "key-1:below");
    lowers[0]
        .realisations
        .lock()
        .unwrap()
        .insert(id.id(), below.clone());
    let client = w.client();
    assert_eq!(client.realisation(&id).unwrap(), Some(below));
    let error = client
        .register_realisation(&realisation(&other.0.path, "key-1:x"))
        .unwrap_err();
    assert!(
        error.to_string().contains("already have another one"),
        "{error}"
    );
    client
        .register_realisation(&realisation(&top.0.path, "key-1:above"))
        .unwrap();
    let found = client.realisation(&id).unwrap().unwrap();
    assert_eq!(found.out_path, top.0.path);
    assert_eq!(found.signatures.len(), 2, "{found:?}");
}

#[test]
fn row_15_a_closure_is_synced_level_by_level() {
    let Some((w, lowers)) = World::plain(1) else {
        return;
    };
    // Ten levels of twenty paths, each of which refers to all of the level below.
    let mut level: Vec<(PathInfo, Vec<u8>)> = Vec::new();
    for depth in 0..10 {
        let references: Vec<StorePath> = level.iter().map(|(i, _)| i.path.clone()).collect();
        let references: Vec<&StorePath> = references.iter().collect();
        level = (0..20)
            .map(|n| archive(&format!("p-{depth}-{n}"), "x", &references))
            .collect();
        level.iter().for_each(|path| lowers[0].add(path));
    }
    let client = w.client();
    lowers[0].queries.store(0, Ordering::Relaxed);
    add_text(&*client, "top", "text", &[&level[0].0.path]).unwrap();
    let queries = lowers[0].queries.load(Ordering::Relaxed);
    assert!(queries <= 14, "{queries} queries for ten levels");
    lowers[0].queries.store(0, Ordering::Relaxed);
    add_text(&*client, "again", "text", &[&level[0].0.path]).unwrap();
    assert!(lowers[0].queries.load(Ordering::Relaxed) <= 3);
}

#[test]
fn several_lowers_answer_in_turn() {
    let Some((w, lowers)) = World::plain(2) else {
        return;
    };
    let one = archive("one", "1", &[]);
    let two = archive("two", "2", &[]);
    lowers[0].add(&one);
    lowers[1].add(&two);
    let client = w.client();
    let both = [one.0.path.clone(), two.0.path.clone()];
    let absent = archive("absent", "", &[]).0.path;
    let asked = [both[0].clone(), absent, both[1].clone()];
    assert_eq!(client.valid_paths(&asked, false, &Silent).unwrap(), both);
    add_text(&*client, "above", "text", &[&both[0], &both[1]]).unwrap();
    add(&*client, &archive("copied", "x", &[&both[1]]), UNSIGNED).unwrap();
    assert_eq!(client.referrers(&both[1]).unwrap().len(), 2);
    // A lower that is not our castore is never written to.
    assert_eq!(std::fs::read_dir(&lowers[0].dir).unwrap().count(), 1);
    assert_eq!(std::fs::read_dir(&lowers[1].dir).unwrap().count(), 1);
}

#[test]
fn leftovers_above_and_below_are_in_nobodys_way() {
    let Some((w, lowers)) = World::plain(1) else {
        return;
    };
    let client = w.client();
    let path = archive("leftover", "text", &[]);
    // In the lower's directory, and not valid there: an addition under way, or one that was interrupted.
    let below = lowers[0].dir.join(path.0.path.base_name());
    std::fs::create_dir(&below).unwrap();
    std::fs::write(below.join("half"), b"").unwrap();
    add(&*client, &path, UNSIGNED).unwrap();
    assert!(!w.merged(&path.0.path).join("half").exists());
    assert!(w.merged(&path.0.path).join("file").exists());
    w.no_whiteouts();
    // In the upper.
    let path = archive("upper-leftover", "text", &[]);
    std::fs::create_dir(w.merged(&path.0.path)).unwrap();
    std::fs::write(w.merged(&path.0.path).join("half"), b"").unwrap();
    add(&*client, &path, UNSIGNED).unwrap();
    assert!(!w.upper(&path.0.path).join("half").exists());
    w.no_whiteouts();
}

#[test]
fn logs_are_where_nix_has_them() {
    let Some((w, _)) = World::plain(1) else {
        return;
    };
    let drv = archive("some.drv", "", &[]).0.path;
    let client = w.client();
    client.add_build_log(&drv, &mut &b"line\n"[..]).unwrap();
    client.add_build_log(&drv, &mut &b"another"[..]).unwrap();
    let (folder, name) = drv.base_name().split_at(2);
    let file = w.dir.path().join("root/nix/var/log/nix/drvs").join(folder);
    let file = file.join(format!("{name}.bz2"));
    assert_eq!(&std::fs::read(&file).unwrap()[..3], b"BZh");
    let overlay = w.overlay.as_ref().unwrap();
    let mut text = String::new();
    overlay
        .build_log(&drv)
        .unwrap()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert_eq!(text, "line\n");
    let other = archive("other.drv", "", &[]).0.path;
    assert!(overlay.build_log(&other).unwrap().is_none());
    assert!(file.as_os_str().as_bytes().ends_with(b".drv.bz2"));
}
