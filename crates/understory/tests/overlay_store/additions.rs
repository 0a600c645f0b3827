//! What is added, through the overlay and below it, and where it lands.

use super::common::archive;
use super::common::overlay::CLIENT;
use super::support::{REPAIR, UNSIGNED, World, add, add_text, info_of};
use std::collections::{BTreeMap, BTreeSet};
use std::io::BufReader;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use understory::add::AddMethod;
use understory::daemon::{AddOptions, Backend, ClientInfo, Silent};
use understory_nix::worker::SetOptions;
use understory_nix::{
    ContentAddressMethod, Hash, HashAlgorithm, NarHash, SecretKey, Signature, StoreDir,
};

#[test]
fn what_is_copied_in_goes_below_and_is_seen_though_it_was_looked_up_before() {
    let Some(w) = World::castore() else { return };
    let client = w.client();
    let one = archive("one", "1", &[]);
    let two = archive("two", "2", &[&one.0.path]);
    assert!(!w.merged(&one.0.path).exists(), "overlayfs remembers this");
    let error = add(&*client, &two, UNSIGNED).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("path '/nix/store/{}' is not valid", one.0.path)
    );
    add(&*client, &one, UNSIGNED).unwrap();
    assert_eq!(
        std::fs::read(w.merged(&one.0.path).join("file")).unwrap(),
        b"1"
    );
    add(&*client, &two, UNSIGNED).unwrap();
    for path in [&one.0.path, &two.0.path] {
        assert!(w.store().is_valid(path).unwrap());
        assert!(client.is_valid(path).unwrap());
    }
    assert_eq!(w.upper_names(), BTreeSet::new());

    // What refers to something of the upper cannot go below it.
    let local = add_text(&*client, "local", "text", &[&two.0.path]).unwrap();
    assert_eq!(w.upper_names(), [local.path.base_name().to_owned()].into());
    let three = archive("three", "3", &[&local.path, &one.0.path]);
    add(&*client, &three, UNSIGNED).unwrap();
    assert!(!w.store().is_valid(&three.0.path).unwrap());
    assert!(w.upper(&three.0.path).join("file").exists());
    let found = info_of(&*client, &three.0.path).unwrap();
    assert_eq!(found.references, three.0.references);
    assert_eq!(found.nar_hash, three.0.nar_hash);
    assert_eq!(client.referrers(&one.0.path).unwrap().len(), 2);
    let part = three.0.path.hash_part();
    assert_eq!(
        client.path_from_hash_part(part).unwrap(),
        Some(three.0.path.clone())
    );
    // Canonical, and no lock is left.
    let file = w.upper(&three.0.path).join("file").metadata().unwrap();
    assert_eq!(
        (file.permissions().mode() & 0o7777, file.mtime()),
        (0o444, 1)
    );
    let mut again = Vec::new();
    client.nar(&three.0.path).unwrap()(&mut again).unwrap();
    assert_eq!(again, three.1);
    let mut again = Vec::new();
    client.nar(&two.0.path).unwrap()(&mut again).unwrap();
    assert_eq!(again, two.1);
}

#[test]
fn a_publication_by_anybody_is_seen_through_the_overlay_at_once() {
    let Some(w) = World::castore() else { return };
    let (info, nar) = archive("late", "x", &[]);
    assert!(!w.merged(&info.path).exists());
    let owner = w.store().temp_root_owner().unwrap();
    understory::add::add_nar(
        w.store(),
        &owner,
        info.clone(),
        &mut BufReader::new(&nar[..]),
        Default::default(),
    )
    .unwrap();
    assert!(w.merged(&info.path).join("file").exists());
}

#[test]
fn nothing_is_left_of_what_lies_about_itself() {
    let Some((w, _)) = World::plain(1) else {
        return;
    };
    let client = w.client();
    let (good, nar) = archive("liar", "text", &[]);
    let mut other = good.clone();
    other.nar_hash = NarHash([7; 32]);
    let error = add(&*client, &(other, nar.clone()), UNSIGNED).unwrap_err();
    let path = format!("/nix/store/{}", good.path);
    assert!(
        error
            .to_string()
            .starts_with(&format!("hash mismatch importing path '{path}';")),
        "{error}"
    );
    let mut other = good.clone();
    other.nar_size += 1;
    let error = add(&*client, &(other, nar.clone()), UNSIGNED).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("size mismatch importing path"),
        "{error}"
    );
    let cut = nar[..nar.len() - 9].to_vec();
    add(&*client, &(good.clone(), cut), UNSIGNED).unwrap_err();
    let mut lonely = good.clone();
    lonely.references = [archive("absent", "", &[]).0.path].into();
    let error = add(&*client, &(lonely, nar.clone()), UNSIGNED).unwrap_err();
    assert!(
        error.to_string().ends_with("-absent' is not valid"),
        "{error}"
    );
    assert!(!w.upper(&good.path).exists());
    let strict = AddOptions {
        check_signatures: true,
        ..UNSIGNED
    };
    let error = add(&*client, &(good.clone(), nar.clone()), strict).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("cannot add path '{path}' because it lacks a signature by a trusted key")
    );
    let good_name = good.path.base_name().to_owned();
    add(&*client, &(good, nar), UNSIGNED).unwrap();
    assert_eq!(w.upper_names(), [good_name].into());
    w.no_whiteouts();
}

#[test]
fn a_trusted_client_brings_its_own_keys() {
    let Some((w, _)) = World::plain(1) else {
        return;
    };
    let key = SecretKey::generate("theirs").unwrap();
    let (mut info, nar) = archive("signed", "text", &[]);
    info.ca = None;
    info.sign(&StoreDir::default(), &key);
    let signed = (info, nar);
    let choice = SetOptions {
        overrides: BTreeMap::from([(
            b"trusted-public-keys".to_vec(),
            key.public().to_string().into_bytes(),
        )]),
        ..SetOptions::default()
    };
    let strict = AddOptions {
        check_signatures: true,
        ..UNSIGNED
    };
    let untrusted = ClientInfo {
        trusted: false,
        ..CLIENT
    };
    let untrusted = w.overlay.as_ref().unwrap().connect(&untrusted).unwrap();
    untrusted.set_options(&choice).unwrap();
    let error = add(&*untrusted, &signed, strict).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "cannot add path '/nix/store/{}' because it lacks a signature by a trusted key",
            signed.0.path
        )
    );
    let trusted = w.client();
    trusted.set_options(&choice).unwrap();
    add(&*trusted, &signed, strict).unwrap();
    assert!(trusted.is_valid(&signed.0.path).unwrap());
}

#[test]
fn dumps_of_all_methods_small_and_large() {
    let Some((w, _)) = World::plain(1) else {
        return;
    };
    let client = w.client();
    let large = vec![b'x'; (32 << 20) + 5];
    let none = BTreeSet::new();
    for contents in [&b"small"[..], &large] {
        let mut nar = understory_nix::nar::Writer::new(Vec::new());
        nar.file(None, true, contents.len() as u64).unwrap();
        nar.contents(contents).unwrap();
        let nar = nar.finish().unwrap();
        for (method, algorithm) in [
            (ContentAddressMethod::Nar, HashAlgorithm::Sha256),
            (ContentAddressMethod::Nar, HashAlgorithm::Sha1),
            (ContentAddressMethod::Git, HashAlgorithm::Sha1),
            (ContentAddressMethod::Flat, HashAlgorithm::Sha512),
            (ContentAddressMethod::Text, HashAlgorithm::Sha256),
        ] {
            let how = AddMethod { method, algorithm };
            let is_flat = matches!(
                method,
                ContentAddressMethod::Flat | ContentAddressMethod::Text
            );
            let mut dump: &[u8] = if is_flat { contents } else { &nar };
            let name = format!("{}-{}", algorithm.name(), contents.len());
            let info = client
                .add_dump(&name, &how, &none, false, &mut dump, &Silent)
                .unwrap();
            assert!(dump.is_empty());
            assert!(info.is_content_addressed(&StoreDir::default()));
            assert!(info.registration_time > 0);
            let file = w.upper(&info.path).metadata().unwrap();
            assert_eq!(file.len(), contents.len() as u64, "{how:?}");
            let mode = if is_flat { 0o444 } else { 0o555 };
            assert_eq!(
                (file.permissions().mode() & 0o7777, file.mtime()),
                (mode, 1)
            );
            let mut out = Vec::new();
            client.nar(&info.path).unwrap()(&mut out).unwrap();
            assert_eq!(
                Hash::of(HashAlgorithm::Sha256, &out),
                info.nar_hash.to_hash()
            );
            // Once more writes nothing.
            let inode = file.ino();
            let mut dump: &[u8] = if is_flat { contents } else { &nar };
            let again = client
                .add_dump(&name, &how, &none, false, &mut dump, &Silent)
                .unwrap();
            assert_eq!(again, info);
            assert_eq!(w.upper(&info.path).metadata().unwrap().ino(), inode);
        }
    }
    assert!(w.upper_names().iter().all(|name| !name.starts_with("tmp-")));
}

#[test]
fn row_04_a_reference_that_is_valid_only_below() {
    let Some(w) = World::castore() else { return };
    let leaf = w.below("leaf", "leaf", &[]);
    let middle = w.below("middle", "middle", &[&leaf]);
    let client = w.client();
    let info = add_text(&*client, "above", "of middle", &[&middle]).unwrap();
    assert_eq!(info.references, [middle.clone()].into());
    assert_eq!(
        client.referrers(&middle).unwrap(),
        [info.path.clone()].into()
    );
    // What is nowhere is still an error, in Nix's words, and leaves nothing.
    let absent = archive("absent", "", &[]).0.path;
    let error = add_text(&*client, "bad", "text", &[&absent]).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("path '/nix/store/{absent}' is not valid")
    );
    assert_eq!(w.upper_names(), [info.path.base_name().to_owned()].into());
}

#[test]
fn row_05_and_17_a_lower_object_is_repaired_by_a_fresh_upper_copy() {
    let Some((w, lowers)) = World::plain(1) else {
        return;
    };
    let leaf = archive("leaf", "leaf", &[]);
    let top = archive("top", "what it should be", &[&leaf.0.path]);
    lowers[0].add(&leaf);
    lowers[0].add(&top);
    let client = w.client();
    let below = lowers[0].dir.join(top.0.path.base_name());
    std::fs::write(below.join("file"), b"damaged").unwrap();
    std::fs::write(below.join("more"), b"must not show through").unwrap();
    assert_eq!(
        std::fs::read(w.merged(&top.0.path).join("file")).unwrap(),
        b"damaged"
    );
    add(&*client, &top, REPAIR).unwrap();
    assert_eq!(
        std::fs::read(w.merged(&top.0.path).join("file")).unwrap(),
        b"what it should be"
    );
    assert!(!w.merged(&top.0.path).join("more").exists());
    assert!(w.upper(&top.0.path).join("file").exists());
    w.no_whiteouts();
    let mut nar = Vec::new();
    client.nar(&top.0.path).unwrap()(&mut nar).unwrap();
    assert_eq!(nar, top.1);
    // Again, over an upper copy.
    add(&*client, &top, REPAIR).unwrap();
    assert!(!w.merged(&top.0.path).join("more").exists());
    assert!(w.upper_names().iter().all(|name| !name.starts_with("tmp-")));
}

#[test]
fn row_06_signatures_of_a_lower_only_path() {
    let Some(w) = World::castore() else { return };
    let leaf = w.below("leaf", "leaf", &[]);
    let top = w.below("top", "top", &[&leaf]);
    let client = w.client();
    let key = understory_nix::SecretKey::generate("test-1").unwrap();
    let signature: BTreeSet<Signature> = [key.sign(b"anything")].into();
    client.add_signatures(&top, &signature).unwrap();
    assert_eq!(info_of(&*client, &top).unwrap().signatures, signature);
    assert!(
        w.store()
            .path(&top)
            .unwrap()
            .unwrap()
            .info
            .signatures
            .is_empty()
    );
    let absent = archive("absent", "", &[]).0.path;
    let error = client.add_signatures(&absent, &signature).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("path '/nix/store/{absent}' is not valid")
    );
}

#[test]
fn a_leftover_of_the_upper_does_not_hide_what_goes_below() {
    let Some(w) = World::castore() else { return };
    let path = archive("leftover", "text", &[]);
    std::fs::create_dir(w.merged(&path.0.path)).unwrap();
    std::fs::write(w.merged(&path.0.path).join("half"), b"").unwrap();
    add(&*w.client(), &path, UNSIGNED).unwrap();
    assert!(w.store().is_valid(&path.0.path).unwrap());
    assert!(!w.upper(&path.0.path).exists());
    assert_eq!(
        std::fs::read(w.merged(&path.0.path).join("file")).unwrap(),
        b"text"
    );
}
