//! `stats --plot` and `stats --json` on stores of nothing, of one path, and of some with duplicates.

use super::Sandbox;
use std::fs;

#[test]
fn pictures_of_small_stores() {
    let sandbox = Sandbox::new();
    sandbox.ok(&["-q", "init"]);
    for paths in ["empty", "one", "two"] {
        if paths != "empty" {
            let contents = format!("{}{paths}", "all the same ".repeat(500));
            sandbox.add_tree(paths, &contents);
        }
        let svg = format!("{paths}.svg");
        let ran = sandbox.run(&["stats", "--plot", &svg]);
        assert_eq!((ran.code, ran.stdout.as_str()), (0, ""), "{}", ran.stderr);
        let text = fs::read_to_string(sandbox.path().join(&svg)).unwrap();
        assert!(text.starts_with("<svg ") && text.trim_end().ends_with("</svg>"));
        assert!(!text.contains("NaN") && !text.contains("inf\""), "{text}");
        for title in ["From what paths hold", "By kind of file", "Growth"] {
            assert!(text.contains(title), "{title}");
        }
        let png = format!("{paths}.png");
        sandbox.ok(&["-q", "stats", "--plot", &png]);
        let bytes = fs::read(sandbox.path().join(&png)).unwrap();
        assert!(bytes.starts_with(b"\x89PNG\r\n\x1a\n") && bytes.len() > 10_000);
    }
}

#[test]
fn figures_add_up() {
    let sandbox = Sandbox::new();
    let same = "all the same\n".repeat(3_000);
    sandbox.add_tree("one", &same);
    sandbox.add_tree("two", &same);
    sandbox.add_tree("three", &format!("{same}but for the end"));
    let json = sandbox.json(&["stats"]);
    let number = |path: &str| {
        json.pointer(path)
            .and_then(|v| v.as_u64())
            .unwrap_or_else(|| panic!("{path}: {json}"))
    };
    assert_eq!(number("/files"), 6);
    assert_eq!(number("/uniqueFiles"), 3, "two of `file` and one of `tool`");
    let tool = "#!/bin/sh\necho ran\n".len() as u64;
    let files = 3 * same.len() as u64 + "but for the end".len() as u64;
    assert_eq!(number("/apparentBytes"), files + 3 * tool);
    assert_eq!(
        number("/saved/fileDuplicateBytes"),
        same.len() as u64 + 2 * tool
    );
    // What is kept of the contents and what each step saves is what the files hold.
    let data = number("/kinds/data/storedBytes");
    let saved: u64 = [
        "fileDuplicate",
        "maskedDuplicate",
        "chunkDuplicate",
        "compression",
    ]
    .iter()
    .map(|cause| number(&format!("/saved/{cause}Bytes")))
    .sum();
    assert_eq!(saved + data, number("/apparentBytes"));
    assert_eq!(data + number("/saved/overheadBytes"), number("/diskBytes"));
    let classes = json["classes"].as_array().unwrap();
    let bytes: u64 = classes.iter().map(|c| c["bytes"].as_u64().unwrap()).sum();
    assert_eq!(bytes, number("/apparentBytes"));
    assert_eq!(json["growth"].as_array().unwrap().len(), 3);
    assert_eq!(json["growth"][2]["uniqueBytes"], number("/uniqueBytes"));
    assert_eq!(json["largestClosures"].as_array().unwrap().len(), 3);
    assert_eq!(json["isEstimate"], false);
}

#[test]
fn other_names_are_refused() {
    let sandbox = Sandbox::new();
    let ran = sandbox.run(&["stats", "--plot", "x.jpg"]);
    assert_eq!(ran.code, 2);
    assert_eq!(
        ran.stderr,
        "error: x.jpg: expected a name that ends in .svg or .png\n"
    );
}
