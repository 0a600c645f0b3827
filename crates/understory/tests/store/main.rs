//! The store: publication, queries, roots, collection, several processes.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod collection;
mod creation;
mod damage;
mod publication;
mod support;
#[path = "../common/whole.rs"]
mod whole;
