//! What a server says between a request and its reply.

use super::{Decoder, Encoder};
use crate::wire::{SHORT_BYTES_MAX, STRING_BYTES_MAX, WireError};
use std::io::{self, BufRead, Write};

const LAST: u64 = 0x616c_7473;
const ERROR: u64 = 0x6378_7470;
const NEXT: u64 = 0x6f6c_6d67;
const READ: u64 = 0x6461_7461;
const WRITE: u64 = 0x6461_7416;
const START_ACTIVITY: u64 = 0x5354_5254;
const STOP_ACTIVITY: u64 = 0x5354_4f50;
const RESULT: u64 = 0x5253_4c54;
/// Most traces of an error: upstream prints a few dozen at most.
const TRACES_MAX: u64 = 4096;
/// Most fields of an activity: upstream has four.
const FIELDS_MAX: u64 = 256;

/// How much is said: Nix's levels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
#[allow(missing_docs, reason = "the names are Nix's")]
pub enum Verbosity {
    Error = 0,
    Warn = 1,
    Notice = 2,
    Info = 3,
    Talkative = 4,
    Chatty = 5,
    Debug = 6,
    Vomit = 7,
}

impl Verbosity {
    /// The level of that number; larger ones are the last.
    pub fn from_wire(value: u64) -> Self {
        match value {
            0 => Self::Error,
            1 => Self::Warn,
            2 => Self::Notice,
            3 => Self::Info,
            4 => Self::Talkative,
            5 => Self::Chatty,
            6 => Self::Debug,
            _ => Self::Vomit,
        }
    }
}

macro_rules! wire_numbers {
    ($(#[$meta:meta])* $name:ident { $($variant:ident = $number:literal),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[allow(missing_docs, reason = "the names are Nix's")]
        pub enum $name {
            $($variant,)*
            /// A number that this crate does not know.
            Other(u64),
        }
        impl $name {
            /// From the number on the wire.
            pub fn from_wire(value: u64) -> Self {
                match value { $($number => Self::$variant,)* other => Self::Other(other) }
            }
            /// The number on the wire.
            pub fn to_wire(self) -> u64 {
                match self { $(Self::$variant => $number,)* Self::Other(other) => other }
            }
        }
    };
}

wire_numbers!(
    /// What an activity is.
    ActivityType {
        Unknown = 0,
        CopyPath = 100,
        FileTransfer = 101,
        Realise = 102,
        CopyPaths = 103,
        Builds = 104,
        Build = 105,
        OptimiseStore = 106,
        VerifyPaths = 107,
        Substitute = 108,
        QueryPathInfo = 109,
        PostBuildHook = 110,
        BuildWaiting = 111,
        FetchTree = 112,
    }
);
wire_numbers!(
    /// What an activity reports.
    ResultType {
        FileLinked = 100,
        BuildLogLine = 101,
        UntrustedPath = 102,
        CorruptedPath = 103,
        SetPhase = 104,
        Progress = 105,
        SetExpected = 106,
        PostBuildLogLine = 107,
        FetchStatus = 108,
    }
);

/// A field of an activity or result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Field {
    /// A number.
    Int(u64),
    /// A text.
    Text(Vec<u8>),
}

/// An error as it is sent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ErrorMessage {
    /// What went wrong.
    pub message: Vec<u8>,
    /// What was being done, outermost last.
    pub traces: Vec<Vec<u8>>,
    /// The exit status that the client should have; only sent before 1.26.
    pub exit_status: u64,
}

impl ErrorMessage {
    /// An error without traces.
    pub fn new(message: impl Into<Vec<u8>>) -> Self {
        Self {
            message: message.into(),
            traces: Vec::new(),
            exit_status: 1,
        }
    }
}

/// A log message, or the end of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogMessage {
    /// The reply follows.
    Last,
    /// The request has failed; nothing follows.
    Error(ErrorMessage),
    /// Text for the user.
    Next(Vec<u8>),
    /// The client shall send one string of at most this many bytes.
    Read(u64),
    /// Data for the client.
    Write(Vec<u8>),
    /// An activity begins.
    StartActivity {
        /// Unique in the server.
        id: u64,
        /// From which verbosity on it is shown.
        level: u64,
        /// What it is.
        activity: ActivityType,
        /// Text for the user.
        text: Vec<u8>,
        /// Depends on the type.
        fields: Vec<Field>,
        /// The activity around it, or 0.
        parent: u64,
    },
    /// An activity ends.
    StopActivity(u64),
    /// An activity reports.
    Result {
        /// Its id.
        id: u64,
        /// What is reported.
        result: ResultType,
        /// Depends on the type.
        fields: Vec<Field>,
    },
}

impl LogMessage {
    /// Reads one.
    ///
    /// # Errors
    /// Unknown tag, or the stream's.
    pub fn read<R: BufRead>(d: &mut Decoder<R>) -> Result<Self, WireError> {
        Ok(match d.u64()? {
            LAST => Self::Last,
            ERROR => Self::Error(read_error(d)?),
            NEXT => Self::Next(d.bytes(STRING_BYTES_MAX)?),
            READ => Self::Read(d.u64()?),
            WRITE => Self::Write(d.bytes(STRING_BYTES_MAX)?),
            START_ACTIVITY => Self::StartActivity {
                id: d.u64()?,
                level: d.u64()?,
                activity: ActivityType::from_wire(d.u64()?),
                text: d.bytes(STRING_BYTES_MAX)?,
                fields: read_fields(d)?,
                parent: d.u64()?,
            },
            STOP_ACTIVITY => Self::StopActivity(d.u64()?),
            RESULT => Self::Result {
                id: d.u64()?,
                result: ResultType::from_wire(d.u64()?),
                fields: read_fields(d)?,
            },
            tag => {
                return Err(WireError::Unexpected {
                    what: "log message",
                    expected: "a known tag",
                    found: format!("{tag:#x}"),
                });
            }
        })
    }

    /// Writes it.
    ///
    /// # Errors
    /// The stream's.
    pub fn write<W: Write>(&self, e: &mut Encoder<W>) -> io::Result<()> {
        match self {
            Self::Last => e.u64(LAST),
            Self::Error(error) => write_error(e, error),
            Self::Next(text) => {
                e.u64(NEXT)?;
                e.bytes(text)
            }
            Self::Read(length) => {
                e.u64(READ)?;
                e.u64(*length)
            }
            Self::Write(data) => {
                e.u64(WRITE)?;
                e.bytes(data)
            }
            Self::StartActivity {
                id,
                level,
                activity,
                text,
                fields,
                parent,
            } => {
                e.u64(START_ACTIVITY)?;
                e.u64(*id)?;
                e.u64(*level)?;
                e.u64(activity.to_wire())?;
                e.bytes(text)?;
                write_fields(e, fields)?;
                e.u64(*parent)
            }
            Self::StopActivity(id) => {
                e.u64(STOP_ACTIVITY)?;
                e.u64(*id)
            }
            Self::Result { id, result, fields } => {
                e.u64(RESULT)?;
                e.u64(*id)?;
                e.u64(result.to_wire())?;
                write_fields(e, fields)
            }
        }
    }
}

fn read_error<R: BufRead>(d: &mut Decoder<R>) -> Result<ErrorMessage, WireError> {
    if !d.protocol().since(26) {
        return Ok(ErrorMessage {
            message: d.bytes(STRING_BYTES_MAX)?,
            traces: Vec::new(),
            exit_status: d.u64()?,
        });
    }
    let kind = d.bytes(SHORT_BYTES_MAX)?;
    if kind != b"Error" {
        return Err(WireError::Unexpected {
            what: "kind of error",
            expected: "Error",
            found: String::from_utf8_lossy(&kind).into_owned(),
        });
    }
    let _level = d.u64()?;
    let _name = d.bytes(SHORT_BYTES_MAX)?;
    let message = d.bytes(STRING_BYTES_MAX)?;
    read_no_position(d)?;
    let count = d.u64()?;
    if count > TRACES_MAX {
        return Err(WireError::TooLong {
            what: "list of traces",
            max: TRACES_MAX,
            found: count,
        });
    }
    let mut traces = Vec::new();
    for _ in 0..count {
        read_no_position(d)?;
        traces.push(d.bytes(STRING_BYTES_MAX)?);
    }
    Ok(ErrorMessage {
        message,
        traces,
        exit_status: 1,
    })
}

fn read_no_position<R: BufRead>(d: &mut Decoder<R>) -> Result<(), WireError> {
    match d.u64()? {
        0 => Ok(()),
        other => Err(WireError::Unexpected {
            what: "position",
            expected: "0",
            found: other.to_string(),
        }),
    }
}

fn write_error<W: Write>(e: &mut Encoder<W>, error: &ErrorMessage) -> io::Result<()> {
    e.u64(ERROR)?;
    if !e.protocol().since(26) {
        e.bytes(&error.message)?;
        return e.u64(error.exit_status);
    }
    e.bytes("Error")?;
    e.u64(0)?;
    e.bytes("Error")?;
    e.bytes(&error.message)?;
    e.u64(0)?;
    e.u64(error.traces.len() as u64)?;
    for trace in &error.traces {
        e.u64(0)?;
        e.bytes(trace)?;
    }
    Ok(())
}

fn read_fields<R: BufRead>(d: &mut Decoder<R>) -> Result<Vec<Field>, WireError> {
    let count = d.u64()?;
    if count > FIELDS_MAX {
        return Err(WireError::TooLong {
            what: "list of fields",
            max: FIELDS_MAX,
            found: count,
        });
    }
    let mut fields = Vec::new();
    for _ in 0..count {
        fields.push(match d.u64()? {
            0 => Field::Int(d.u64()?),
            1 => Field::Text(d.bytes(STRING_BYTES_MAX)?),
            kind => {
                return Err(WireError::Unexpected {
                    what: "field",
                    expected: "0 or 1",
                    found: kind.to_string(),
                });
            }
        });
    }
    Ok(fields)
}

fn write_fields<W: Write>(e: &mut Encoder<W>, fields: &[Field]) -> io::Result<()> {
    e.u64(fields.len() as u64)?;
    for field in fields {
        match field {
            Field::Int(value) => {
                e.u64(0)?;
                e.u64(*value)?;
            }
            Field::Text(text) => {
                e.u64(1)?;
                e.bytes(text)?;
            }
        }
    }
    Ok(())
}
