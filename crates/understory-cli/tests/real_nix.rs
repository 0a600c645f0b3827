//! Real Nix, of both versions, on our store: each test runs one script of `tests/real-nix` in a Debian root.
//!
//! The scripts print one line for each check. `tests/real-nix/run SCRIPT` runs one by hand.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test that cannot start must fail, and cargo shows its output"
)]

use std::process::{Command, Stdio};
use understory_testkit::corpus::{Packages, Size, edge_cases};
use understory_testkit::nix_root::{NixRoot, Version};
use understory_testkit::{process, repository};

/// Runs a script and fails with its output. Does nothing but say so where no root can be had.
fn script(version: Version, name: &str, arguments: &[&str]) {
    with_variable(version, name, arguments, None);
}

/// As [`script`]; the script sees `directory` as `/big`.
fn with_directory(version: Version, name: &str, arguments: &[&str], directory: &std::path::Path) {
    let directory = directory.as_os_str();
    with_variable(
        version,
        name,
        arguments,
        Some(("UNDERSTORY_TEST_DIR", directory)),
    );
}

/// As [`script`], with something in the environment of `run`.
fn with_variable(
    version: Version,
    name: &str,
    arguments: &[&str],
    variable: Option<(&str, &std::ffi::OsStr)>,
) {
    let Some(binary) = process::understory() else {
        understory_testkit::skip("the program is not built, and UNDERSTORY_BIN is not set");
        return;
    };
    if NixRoot::get(version).is_none() || Packages::get("small").is_none() {
        return;
    }
    let mut command = Command::new(repository().join("tests/real-nix/run"));
    command
        .args(["-n", version.name(), name])
        .args(arguments)
        .env("UNDERSTORY_BIN", binary)
        .envs(variable)
        .stdin(Stdio::null());
    let output = command.output().unwrap();
    let (stdout, stderr) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    print!("{stdout}");
    assert!(
        output.status.success(),
        "{name} with Nix {}: {}\n{stdout}\n{stderr}",
        version.name(),
        output.status
    );
}

/// One test for each version of Nix.
macro_rules! with_each_nix {
    ($($name:ident => $script:literal $(, $argument:literal)*;)*) => {$(
        mod $name {
            use super::*;
            #[test]
            fn real_nix_2_26() {
                script(Version::Nix2_26, $script, &[$($argument),*]);
            }
            #[test]
            fn real_nix_2_34() {
                script(Version::Nix2_34, $script, &[$($argument),*]);
            }
        }
    )*};
}

with_each_nix! {
    everything_that_is_imported_comes_out_as_nix_has_it => "import";
    an_overlay_over_our_lower_store_does_all_that_nix_does => "overlay";
    the_daemon_by_itself_trusts_adds_collects_and_refuses => "daemon";
    a_closure_of_2000_paths => "closure", "2000";
    a_store_directory_of_another_name => "store-dir";
    one_command_and_names_that_were_looked_up_too_early => "up";
    a_full_disk => "full-disk";
    the_overlay_store_of_up_does_all_that_nix_does => "overlay-store";
    stock_nix_and_we_share_an_upper_store => "shared-upper";
    builds_through_the_overlay_store => "overlay-builds";
    the_nixos_module_and_the_units => "nixos-module";
    each_known_defect_of_local_overlay_is_none_of_ours => "rows";
    an_existing_store_is_adopted_and_given_back => "adopt", "3";
}

mod without_root {
    use super::*;
    #[test]
    fn real_nix_2_34() {
        script(Version::Nix2_34, "unprivileged", &[]);
    }
    #[test]
    fn real_nix_2_26() {
        script(Version::Nix2_26, "unprivileged", &[]);
    }
}

/// The same as with a live mount below: on an image, with a new one for each path that comes to the castore.
#[test]
fn an_overlay_on_images_does_all_that_nix_does_real_nix() {
    let options = "--mount image --option image-newer-paths-max 0".as_ref();
    for name in ["overlay-store", "overlay-builds"] {
        with_variable(Version::Nix2_34, name, &[], Some(("UP_OPTIONS", options)));
    }
}

#[test]
fn real_nix_sees_edge_cases_as_they_are() {
    let trees = tempfile::tempdir().unwrap();
    edge_cases(trees.path(), Size::Small).unwrap();
    for version in Version::SUPPORTED {
        with_directory(version, "edge-cases", &["/big"], trees.path());
    }
}

#[test]
fn kill_9_of_additions_loses_nothing_real_nix() {
    let dir = tempfile::tempdir().unwrap();
    with_directory(Version::Nix2_34, "kill", &["6"], dir.path());
}

/// The rows look where the defects are: C++ Nix fails them.
#[test]
fn each_known_defect_shows_with_cpp_nix_real_nix() {
    script(Version::Nix2_34, "rows", &["nix"]);
}

#[test]
fn kill_9_of_the_overlay_store_breaks_nothing_real_nix() {
    script(Version::Nix2_34, "overlay-kill", &["4"]);
}

/// `scripts/restart-test` kills 100.
#[test]
fn killed_mount_servers_cost_no_read_and_no_build_real_nix() {
    script(Version::Nix2_34, "restart", &["8"]);
}

#[test]
fn sixteen_clients_at_once_lose_nothing_real_nix() {
    script(Version::Nix2_34, "concurrency", &["20"]);
}

#[test]
fn collections_beside_an_instance_delete_what_nobody_needs_real_nix() {
    script(Version::Nix2_34, "gc-beside", &["15"]);
}

/// The daemon builds with Nix 2.34, its client is Debian bookworm's own.
#[test]
fn nix_2_8_is_a_client_of_the_overlay_store_real_nix() {
    if let Some(old) = NixRoot::get(Version::Nix2_8) {
        with_directory(Version::Nix2_34, "old-client", &[], old.path());
    }
}

#[test]
fn damage_is_found_and_never_served_real_nix() {
    script(Version::Nix2_34, "damage", &[]);
}

#[test]
fn memory_of_imports_is_bounded_real_nix() {
    script(Version::Nix2_34, "memory", &[]);
}
