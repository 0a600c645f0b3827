//! Whiteouts that deletions and other programs leave.

use super::common::archive;
use super::support::{World, read};
use understory::settings::Settings;

#[test]
fn whiteouts_of_other_programs_are_removed() {
    let Some(world) = World::new() else { return };
    let below = archive("below", "below", &[]);
    world.lower.add(&below);
    world.whiteout(below.0.path.base_name());
    world.whiteout("something");
    let (report, said) = world.delete_dead();
    assert!(report.paths.is_empty());
    assert!(
        said.contains(&format!(
            "warning: '/nix/store/{}' of the lower store was hidden by a whiteout",
            below.0.path
        )),
        "{said}"
    );
    assert!(world.upper_names().is_empty());
    assert_eq!(read(&world.merged(&below.0.path)), "below");
}

#[test]
fn whiteouts_that_a_crash_left_are_removed_at_the_next_open() {
    let Some(mut world) = World::new() else {
        return;
    };
    let below = archive("below", "below", &[]);
    world.lower.add(&below);
    let place = world.merged(&below.0.path);
    assert_eq!(read(&place), "below");
    world.whiteout(below.0.path.base_name());
    world.whiteout("something");
    // What overlayfs has cached is forgotten, too.
    world.open(Settings::default());
    assert!(world.upper_names().is_empty());
    assert_eq!(read(&place), "below");
    let later = archive("later", "later", &[]);
    world.lower.add(&later);
    assert_eq!(read(&world.merged(&later.0.path)), "later");
}
