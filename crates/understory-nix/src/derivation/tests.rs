use super::*;
use proptest::prelude::*;
use std::collections::HashMap;

const HASH: &str = "00bgd045z0d4icpbc2yyz4gx48ak44la";

fn name(text: &str) -> StorePathName {
    StorePathName::new(text).unwrap()
}

fn parse(text: &str) -> Result<Derivation, DerivationError> {
    Derivation::parse(&StoreDir::default(), &name("x"), text.as_bytes())
}

fn message(text: &str) -> String {
    parse(text).unwrap_err().to_string()
}

/// A derivation with one output and nothing else.
fn with_outputs(outputs: &str) -> String {
    format!("Derive([{outputs}],[],[],\"s\",\"b\",[],[])")
}

#[test]
fn escapes_round_trip() {
    let text = "Derive([(\"out\",\"\",\"\",\"\")],[],[],\"s\",\"b\",[\"a\\n\\r\\t\\\"\\\\\"],[(\"k\",\"\u{1}é\")])";
    let derivation = parse(text).unwrap();
    assert_eq!(derivation.args, [b"a\n\r\t\"\\".to_vec()]);
    assert_eq!(
        derivation.print(&StoreDir::default()).unwrap(),
        text.as_bytes()
    );
    // A backslash before any other character means that character.
    assert_eq!(
        parse(&text.replace("\\t", "\\t\\x")).unwrap().args,
        [b"a\n\r\tx\"\\".to_vec()]
    );
}

#[test]
fn refuses() {
    for (text, reason) in [
        ("", "expected 'DrvWithVersion(' at byte 0"),
        ("Derive(", "expected '[' at byte 7"),
        (
            "DrvWithVersion(\"new\",",
            "unknown derivation ATerm format version 'new' at byte 20",
        ),
        (
            "Derive([(\"out\",\"",
            "expected the text that begins here to end at byte 16",
        ),
        (
            &format!("{} ", with_outputs("(\"out\",\"\",\"\",\"\")")),
            "expected the end at byte 46",
        ),
        (
            &with_outputs("(\"out\",\"\",\"\",\"\"),(\"out\",\"\",\"\",\"\")"),
            "the item before is in its list twice at byte 41",
        ),
    ] {
        assert_eq!(
            message(text),
            format!("error parsing derivation 'x': {reason}")
        );
    }
    for (output, expected) in [
        (
            "(\"out\",\"\",\"\",\"00\")",
            "derivation output has a hash '00' without an algorithm",
        ),
        (
            "(\"out\",\"\",\"r:sha3\",\"\")",
            "unknown hash algorithm 'sha3'",
        ),
        (
            "(\"out\",\"\",\"text:sha1\",\"\")",
            "method text needs sha256, found sha1",
        ),
        (
            "(\"out\",\"/x\",\"sha1\",\"\")",
            "content-addressing derivation output must not have a path, has '/x'",
        ),
        (
            "(\"out\",\"x\",\"sha1\",\"00\")",
            "bad path 'x' in derivation",
        ),
        (
            "(\"out\",\"/x\",\"\",\"\")",
            "path '/x' is not in the Nix store",
        ),
    ] {
        assert_eq!(message(&with_outputs(output)), expected);
    }
}

#[test]
fn outputs_must_go_together() {
    let kind = |outputs: &str| {
        parse(&with_outputs(outputs))
            .unwrap()
            .kind()
            .map_err(|error| error.to_string())
    };
    assert_eq!(
        kind(""),
        Err("derivation 'x' must have at least one output".to_owned())
    );
    assert_eq!(
        kind("(\"a\",\"\",\"\",\"\"),(\"b\",\"\",\"sha1\",\"\")"),
        Err("derivation 'x' mixes types of outputs".to_owned())
    );
    assert_eq!(
        kind("(\"a\",\"\",\"md5\",\"\"),(\"b\",\"\",\"sha1\",\"\")"),
        Err("derivation 'x' has outputs with different hash algorithms".to_owned())
    );
    let fixed = "\"/x\",\"md5\",\"d41d8cd98f00b204e9800998ecf8427e\"";
    assert_eq!(
        kind(&format!("(\"a\",{fixed})")),
        Err("derivation 'x' has a fixed output that is not named 'out'".to_owned())
    );
    assert_eq!(
        kind(&format!("(\"a\",{fixed}),(\"out\",{fixed})")),
        Err("derivation 'x' has more than one fixed output".to_owned())
    );
    assert_eq!(
        kind("(\"out\",\"\",\"md5\",\"impure\")"),
        Ok(DerivationKind::Impure)
    );
}

#[test]
fn dynamic_nesting_is_limited() {
    let nested = |depth: usize| {
        let inner = (0..depth).fold("[\"out\"]".to_owned(), |inner, _| {
            format!("([],[(\"out\",{inner})])")
        });
        let input = format!("(\"/nix/store/{HASH}-d.drv\",{inner})");
        format!(
            "DrvWithVersion(\"xp-dyn-drv\",[(\"out\",\"\",\"\",\"\")],[{input}],[],\"s\",\"b\",[],[])"
        )
    };
    let text = nested(DYNAMIC_DEPTH_MAX);
    assert_eq!(
        parse(&text).unwrap().print(&StoreDir::default()).unwrap(),
        text.as_bytes()
    );
    assert!(message(&nested(DYNAMIC_DEPTH_MAX + 1)).contains("nested more than 64 deep"));
    assert!(message(&nested(100_000)).contains("nested more than 64 deep"));
}

/// A chain of derivations, each the input of the next, by path.
fn chain(len: usize) -> (HashMap<StorePath, Derivation>, Derivation) {
    let mut all = HashMap::new();
    let mut last = parse(&with_outputs("(\"out\",\"\",\"\",\"\")")).unwrap();
    for index in 0..len {
        let path = last.make_path(&StoreDir::default()).unwrap();
        all.insert(path.clone(), last.clone());
        last.args = vec![index.to_string().into_bytes()];
        last.input_derivations = [(
            path,
            InputOutputs {
                outputs: ["out".to_owned()].into(),
                ..InputOutputs::default()
            },
        )]
        .into();
    }
    (all, last)
}

#[test]
fn deep_closures_do_not_exhaust_the_stack() {
    let (all, last) = chain(5_000);
    let mut loads = 0;
    let mut modulo = HashModulo::new(StoreDir::default(), |path: &StorePath| {
        loads += 1;
        all.get(path).cloned().ok_or_else(|| "missing".to_owned())
    });
    assert!(modulo.output_paths(&last).unwrap()["out"].is_some());
    modulo.output_paths(&last).unwrap();
    drop(modulo);
    assert_eq!(loads, 5_000);
}

#[test]
fn missing_inputs_and_cycles_are_named() {
    let (mut all, last) = chain(1);
    let path = last.input_derivations.keys().next().unwrap().clone();
    let message = |all: &HashMap<StorePath, Derivation>| {
        HashModulo::new(StoreDir::default(), |path: &StorePath| {
            all.get(path).cloned().ok_or("no such file".to_owned())
        })
        .output_paths(&last)
        .unwrap_err()
        .to_string()
    };
    assert_eq!(
        message(&HashMap::new()),
        format!("loading input derivation '{path}': no such file")
    );
    all.insert(path.clone(), last.clone());
    assert_eq!(
        message(&all),
        format!("loading input derivation '{path}': it is its own input")
    );
    let mut other = last.clone();
    other.input_derivations.clear();
    other.outputs = [("dev".to_owned(), DerivationOutput::Deferred)].into();
    all.insert(path.clone(), other);
    assert_eq!(
        message(&all),
        format!("loading input derivation '{path}': it has no output 'out'")
    );
}

fn derivations() -> impl Strategy<Value = Derivation> {
    let bytes = || proptest::collection::vec(any::<u8>(), 0..12);
    let digest =
        any::<[u8; 32]>().prop_map(|digest| Hash::new(HashAlgorithm::Sha256, &digest).unwrap());
    let method = prop_oneof![
        Just(ContentAddressMethod::Flat),
        Just(ContentAddressMethod::Nar),
        Just(ContentAddressMethod::Text),
        Just(ContentAddressMethod::Git)
    ];
    let path = (any::<[u8; 20]>(), "[a-z]{1,5}")
        .prop_map(|(hash, text)| StorePath::from_parts(crate::StorePathHash(hash), &name(&text)));
    let algorithm = HashAlgorithm::Sha256;
    let output = prop_oneof![
        path.clone().prop_map(DerivationOutput::InputAddressed),
        (method.clone(), digest)
            .prop_map(|(method, hash)| DerivationOutput::Fixed(ContentAddress { method, hash })),
        method
            .clone()
            .prop_map(move |method| DerivationOutput::Floating { method, algorithm }),
        method.prop_map(move |method| DerivationOutput::Impure { method, algorithm }),
        Just(DerivationOutput::Deferred),
    ];
    let names = || proptest::collection::btree_set("[a-z]{1,3}", 0..3);
    let inputs = names().prop_map(|outputs| InputOutputs {
        outputs,
        dynamic: BTreeMap::new(),
    });
    let inputs = inputs.prop_recursive(3, 12, 3, move |inner| {
        (
            names(),
            proptest::collection::btree_map("[a-z]{1,3}", inner, 0..3),
        )
            .prop_map(|(outputs, dynamic)| InputOutputs { outputs, dynamic })
    });
    (
        proptest::collection::btree_map("[a-z]{1,5}", output, 0..4),
        proptest::collection::btree_map(path.clone(), inputs, 0..4),
        proptest::collection::btree_set(path, 0..4),
        (bytes(), bytes()),
        proptest::collection::vec(bytes(), 0..4),
        proptest::collection::btree_map(bytes(), bytes(), 0..4),
    )
        .prop_map(
            |(outputs, input_derivations, input_sources, (platform, builder), args, env)| {
                Derivation {
                    name: name("x"),
                    outputs,
                    input_derivations,
                    input_sources,
                    platform,
                    builder,
                    args,
                    env,
                }
            },
        )
}

proptest! {
    #[test]
    fn round_trip(derivation in derivations()) {
        let dir = StoreDir::new("/a/b").unwrap();
        let text = derivation.print(&dir).unwrap();
        prop_assert_eq!(Derivation::parse(&dir, &derivation.name, &text).unwrap(), derivation);
    }

    #[test]
    fn never_panics(derivation in derivations(), at: prop::sample::Index, byte: u8) {
        let dir = StoreDir::default();
        let mut text = derivation.print(&dir).unwrap();
        let at = at.index(text.len());
        text[at] = byte;
        let _ = Derivation::parse(&dir, &derivation.name, &text);
        let _ = Derivation::parse(&dir, &derivation.name, &text[..at]);
    }
}
