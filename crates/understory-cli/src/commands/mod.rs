//! One module per command: its arguments and what it does.

pub(crate) mod add;
pub(crate) mod adopt;
pub(crate) mod cat;
pub(crate) mod check;
pub(crate) mod completions;
pub(crate) mod config;
pub(crate) mod delete;
pub(crate) mod demo;
pub(crate) mod doctor;
pub(crate) mod down;
pub(crate) mod enter;
pub(crate) mod export;
pub(crate) mod gc;
pub(crate) mod import;
pub(crate) mod info;
pub(crate) mod init;
pub(crate) mod ls;
pub(crate) mod man;
pub(crate) mod mount;
pub(crate) mod overlay;
pub(crate) mod roots;
pub(crate) mod serve;
pub(crate) mod shell;
pub(crate) mod stats;
pub(crate) mod status;
pub(crate) mod up;
