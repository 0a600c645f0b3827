//! `edge_cases DIR [full]`: makes the trees of edge cases in DIR, to look at them by hand.

use understory_testkit::corpus::{Size, edge_cases};

fn main() -> std::io::Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let Some(dir) = arguments.next() else {
        return Err(std::io::Error::other("usage: edge_cases DIR [full]"));
    };
    let size = if arguments.next().is_some_and(|a| a == "full") {
        Size::Full
    } else {
        Size::Small
    };
    edge_cases(dir.as_ref(), size)
}
