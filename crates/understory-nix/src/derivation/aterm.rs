//! The text of a `.drv` file.
//!
//! ```text
//! Derive([outputs],[inputs],[sources],"platform","builder",[args],[env])
//! output = ("name","path","algorithm","hash")
//! input  = ("path",outputs)            outputs = ["name",…]
//! env    = ("key","value")                     | (["name",…],[("name",outputs),…])
//! ```
//! No white space; lists of names, paths and keys are sorted. In texts, backslash stands before
//! `"`, `\`, and `n` `r` `t` for the control characters. With dynamic inputs the file begins with
//! `DrvWithVersion("xp-dyn-drv",` instead.

use super::{
    DRV_BYTES_MAX, DYNAMIC_DEPTH_MAX, Derivation, DerivationError, DerivationOutput, InputOutputs,
};
use crate::store_path::{StoreDir, StorePath, StorePathName};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

/// The version that allows dynamic inputs.
const VERSION_DYNAMIC: &[u8] = b"xp-dyn-drv";

pub(super) fn parse(
    dir: &StoreDir,
    name: &StorePathName,
    text: &[u8],
) -> Result<Derivation, DerivationError> {
    let mut parser = Parser {
        name: name.as_str(),
        text,
        at: 0,
        is_dynamic: false,
    };
    if text.len() > DRV_BYTES_MAX {
        return Err(parser.error(format!(
            "expected at most {DRV_BYTES_MAX} bytes, found {}",
            text.len()
        )));
    }
    parser.header()?;
    let outputs = parser.map(|parser| {
        parser.expect(b"(")?;
        let output_name = parser.utf8()?;
        let [path, algorithm, hash] = [
            parser.comma_utf8()?,
            parser.comma_utf8()?,
            parser.comma_utf8()?,
        ];
        parser.expect(b")")?;
        let output = DerivationOutput::parse(dir, &path, &algorithm, &hash)?;
        Ok((
            StorePathName::new(&output_name)?.as_str().to_owned(),
            output,
        ))
    })?;
    parser.expect(b",")?;
    let input_derivations = parser.map(|parser| {
        parser.expect(b"(")?;
        let path = parser.path(dir)?;
        parser.expect(b",")?;
        let outputs = parser.input_outputs(0)?;
        parser.expect(b")")?;
        Ok((path, outputs))
    })?;
    parser.expect(b",")?;
    let input_sources = parser
        .map(|parser| Ok((parser.path(dir)?, ())))?
        .into_keys()
        .collect();
    parser.expect(b",")?;
    let platform = parser.string()?.into_owned();
    parser.expect(b",")?;
    let builder = parser.string()?.into_owned();
    parser.expect(b",")?;
    let mut args = Vec::new();
    parser.list(|parser| {
        args.push(parser.string()?.into_owned());
        Ok(())
    })?;
    parser.expect(b",")?;
    let env = parser.map(|parser| {
        parser.expect(b"(")?;
        let key = parser.string()?.into_owned();
        parser.expect(b",")?;
        let value = parser.string()?.into_owned();
        parser.expect(b")")?;
        Ok((key, value))
    })?;
    parser.expect(b")")?;
    if parser.at < text.len() {
        return Err(parser.error("expected the end".to_owned()));
    }
    Ok(Derivation {
        name: name.clone(),
        outputs,
        input_derivations,
        input_sources,
        platform,
        builder,
        args,
        env,
    })
}

/// Prints; with `mask_outputs` the outputs' paths are blank, and with `inputs` those stand in
/// place of the input derivations: outputs by the hash of their derivation.
pub(super) fn print(
    derivation: &Derivation,
    dir: &StoreDir,
    mask_outputs: bool,
    inputs: Option<&BTreeMap<String, InputOutputs>>,
) -> Result<Vec<u8>, DerivationError> {
    let mut out = Vec::new();
    if derivation
        .input_derivations
        .values()
        .any(|outputs| !outputs.dynamic.is_empty())
    {
        out.extend_from_slice(b"DrvWithVersion(\"xp-dyn-drv\",");
    } else {
        out.extend_from_slice(b"Derive(");
    }
    put_list(
        &mut out,
        b'[',
        &derivation.outputs,
        |out, (name, output)| {
            let (path, algorithm, hash) = output.print(dir, &derivation.name, name)?;
            let path = if mask_outputs { String::new() } else { path };
            put_list(out, b'(', [name, &path, &algorithm, &hash], |out, text| {
                put_string(out, text.as_bytes());
                Ok(())
            })
        },
    )?;
    out.push(b',');
    if let Some(inputs) = inputs {
        put_list(&mut out, b'[', inputs, |out, (key, outputs)| {
            put_input(out, key, outputs)
        })?;
    } else {
        let inputs = &derivation.input_derivations;
        put_list(&mut out, b'[', inputs, |out, (path, outputs)| {
            put_input(out, &dir.print(path), outputs)
        })?;
    }
    out.push(b',');
    put_list(&mut out, b'[', &derivation.input_sources, |out, path| {
        put_string(out, dir.print(path).as_bytes());
        Ok(())
    })?;
    out.push(b',');
    put_string(&mut out, &derivation.platform);
    out.push(b',');
    put_string(&mut out, &derivation.builder);
    out.push(b',');
    put_list(&mut out, b'[', &derivation.args, |out, arg| {
        put_string(out, arg);
        Ok(())
    })?;
    out.push(b',');
    put_list(&mut out, b'[', &derivation.env, |out, (key, value)| {
        let is_output =
            || std::str::from_utf8(key).is_ok_and(|key| derivation.outputs.contains_key(key));
        let value = if mask_outputs && is_output() {
            &[]
        } else {
            &value[..]
        };
        put_list(out, b'(', [&key[..], value], |out, text| {
            put_string(out, text);
            Ok(())
        })
    })?;
    out.push(b')');
    Ok(out)
}

fn put_input(out: &mut Vec<u8>, key: &str, outputs: &InputOutputs) -> Result<(), DerivationError> {
    out.push(b'(');
    put_string(out, key.as_bytes());
    out.push(b',');
    put_outputs(out, outputs)?;
    out.push(b')');
    Ok(())
}

fn put_outputs(out: &mut Vec<u8>, outputs: &InputOutputs) -> Result<(), DerivationError> {
    if !outputs.dynamic.is_empty() {
        out.push(b'(');
    }
    put_list(out, b'[', &outputs.outputs, |out, name| {
        put_string(out, name.as_bytes());
        Ok(())
    })?;
    if !outputs.dynamic.is_empty() {
        out.push(b',');
        put_list(out, b'[', &outputs.dynamic, |out, (name, outputs)| {
            put_input(out, name, outputs)
        })?;
        out.push(b')');
    }
    Ok(())
}

fn put_list<T>(
    out: &mut Vec<u8>,
    open: u8,
    items: impl IntoIterator<Item = T>,
    mut put: impl FnMut(&mut Vec<u8>, T) -> Result<(), DerivationError>,
) -> Result<(), DerivationError> {
    out.push(open);
    for (index, item) in items.into_iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        put(out, item)?;
    }
    out.push(if open == b'(' { b')' } else { b']' });
    Ok(())
}

fn put_string(out: &mut Vec<u8>, text: &[u8]) {
    out.push(b'"');
    for &byte in text {
        match byte {
            b'"' | b'\\' => out.extend_from_slice(&[b'\\', byte]),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            other => out.push(other),
        }
    }
    out.push(b'"');
}

struct Parser<'a> {
    name: &'a str,
    text: &'a [u8],
    at: usize,
    is_dynamic: bool,
}

impl<'a> Parser<'a> {
    fn header(&mut self) -> Result<(), DerivationError> {
        if self.text.starts_with(b"Derive(") {
            return self.expect(b"Derive(");
        }
        self.expect(b"DrvWithVersion(")?;
        let version = self.string()?;
        if *version != *VERSION_DYNAMIC {
            return Err(self.error(format!(
                "unknown derivation ATerm format version '{}'",
                version.escape_ascii()
            )));
        }
        self.is_dynamic = true;
        self.expect(b",")
    }

    fn input_outputs(&mut self, depth: usize) -> Result<InputOutputs, DerivationError> {
        if depth > DYNAMIC_DEPTH_MAX {
            return Err(self.error(format!(
                "dynamic inputs are nested more than {DYNAMIC_DEPTH_MAX} deep"
            )));
        }
        if !self.is_dynamic || self.peek() != Some(b'(') {
            return Ok(InputOutputs {
                outputs: self.names()?,
                dynamic: BTreeMap::new(),
            });
        }
        self.expect(b"(")?;
        let outputs = self.names()?;
        self.expect(b",")?;
        let dynamic = self.map(|parser| {
            parser.expect(b"(")?;
            let name = parser.utf8()?;
            parser.expect(b",")?;
            let outputs = parser.input_outputs(depth + 1)?;
            parser.expect(b")")?;
            Ok((name, outputs))
        })?;
        self.expect(b")")?;
        Ok(InputOutputs { outputs, dynamic })
    }

    fn names(&mut self) -> Result<BTreeSet<String>, DerivationError> {
        Ok(self
            .map(|parser| Ok((parser.utf8()?, ())))?
            .into_keys()
            .collect())
    }

    /// Parses a list of items with distinct keys.
    fn map<K: Ord, V>(
        &mut self,
        mut item: impl FnMut(&mut Self) -> Result<(K, V), DerivationError>,
    ) -> Result<BTreeMap<K, V>, DerivationError> {
        let mut map = BTreeMap::new();
        self.list(|parser| {
            let (key, value) = item(parser)?;
            match map.insert(key, value) {
                None => Ok(()),
                Some(_) => Err(parser.error("the item before is in its list twice".to_owned())),
            }
        })?;
        Ok(map)
    }

    fn list(
        &mut self,
        mut item: impl FnMut(&mut Self) -> Result<(), DerivationError>,
    ) -> Result<(), DerivationError> {
        self.expect(b"[")?;
        if self.peek() == Some(b']') {
            self.at += 1;
            return Ok(());
        }
        loop {
            item(self)?;
            match self.peek() {
                Some(b',') => self.at += 1,
                Some(b']') => {
                    self.at += 1;
                    return Ok(());
                }
                _ => return Err(self.error("expected ',' or ']'".to_owned())),
            }
        }
    }

    fn path(&mut self, dir: &StoreDir) -> Result<StorePath, DerivationError> {
        Ok(dir.parse(&self.string()?)?)
    }

    fn comma_utf8(&mut self) -> Result<String, DerivationError> {
        self.expect(b",")?;
        self.utf8()
    }

    fn utf8(&mut self) -> Result<String, DerivationError> {
        String::from_utf8(self.string()?.into_owned())
            .map_err(|_| self.error("the text before is not UTF-8".to_owned()))
    }

    fn string(&mut self) -> Result<Cow<'a, [u8]>, DerivationError> {
        self.expect(b"\"")?;
        let rest = &self.text[self.at..];
        // Most texts have no escapes: those are not copied here.
        let plain = rest
            .iter()
            .position(|byte| matches!(byte, b'"' | b'\\'))
            .unwrap_or(rest.len());
        if rest.get(plain) == Some(&b'"') {
            self.at += plain + 1;
            return Ok(Cow::Borrowed(&rest[..plain]));
        }
        let mut out = Vec::with_capacity(plain * 2);
        let mut bytes = rest.iter().enumerate();
        while let Some((index, &byte)) = bytes.next() {
            match byte {
                b'"' => {
                    self.at += index + 1;
                    return Ok(Cow::Owned(out));
                }
                b'\\' => match bytes.next() {
                    Some((_, b'n')) => out.push(b'\n'),
                    Some((_, b'r')) => out.push(b'\r'),
                    Some((_, b't')) => out.push(b'\t'),
                    Some((_, &other)) => out.push(other),
                    None => break,
                },
                other => out.push(other),
            }
        }
        Err(self.error("expected the text that begins here to end".to_owned()))
    }

    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn expect(&mut self, expected: &[u8]) -> Result<(), DerivationError> {
        if !self.text[self.at..].starts_with(expected) {
            return Err(self.error(format!("expected '{}'", expected.escape_ascii())));
        }
        self.at += expected.len();
        Ok(())
    }

    fn error(&self, reason: String) -> DerivationError {
        DerivationError::Syntax {
            name: self.name.to_owned(),
            offset: self.at,
            reason,
        }
    }
}
