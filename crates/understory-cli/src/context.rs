//! What every command is given: how to talk, and which store.

use crate::env;
use crate::error::{CommandError, Result};
use crate::ui::Ui;
use std::path::PathBuf;
use understory::config::{Layout, LayoutOptions, default_store};
use understory::{Store, StoreOptions};
use understory_nix::StoreDir;

/// What every command is given.
pub(crate) struct Context {
    pub(crate) ui: Ui,
    pub(crate) json: bool,
    store: Option<PathBuf>,
    /// True if we were started as root. A user namespace makes anybody root, but nobody's default store
    /// may change on entering one.
    root: bool,
}

impl Context {
    /// Made before namespaces are entered.
    pub(crate) fn new(ui: Ui, json: bool, store: Option<PathBuf>) -> Self {
        Self {
            ui,
            json,
            store,
            root: rustix::process::geteuid().is_root(),
        }
    }
    /// The same with another store.
    pub(crate) fn with_store(&self, store: PathBuf) -> Self {
        Self {
            ui: self.ui.clone(),
            json: self.json,
            store: Some(store),
            root: self.root,
        }
    }
    /// The store's directory, absolute.
    pub(crate) fn store_path(&self) -> Result<PathBuf> {
        let given = self.store.clone().filter(|dir| !dir.as_os_str().is_empty());
        let dir = match given {
            Some(dir) => dir,
            None => default_store(
                self.root,
                env::path(env::XDG_STATE_HOME).as_deref(),
                env::path(env::HOME).as_deref(),
            )
            .ok_or_else(|| {
                CommandError::usage("no store is named and there is no home directory")
                    .hint("use --store")
            })?,
        };
        Ok(understory::config::absolute(&dir)?)
    }
    /// The instance's layout.
    pub(crate) fn layout(&self, options: &LayoutOptions) -> Result<Layout> {
        let store = self.store_path()?;
        let mut options = options.clone();
        understory::adopt::complete_layout(&store, &mut options)?;
        Ok(Layout::new(&store, &options)?)
    }
    /// Opens the store to read.
    pub(crate) fn open(&self) -> Result<Store> {
        self.open_with(true)
    }
    /// Opens the store to change it.
    pub(crate) fn open_to_write(&self) -> Result<Store> {
        self.open_with(false)
    }
    /// Opens the store so that paths can be kept from being collected, or to read if we may not write to it.
    pub(crate) fn open_to_keep(&self) -> Result<Store> {
        self.open_with(false).or_else(|_| self.open_with(true))
    }
    fn open_with(&self, read_only: bool) -> Result<Store> {
        let dir = self.store_path()?;
        if !is_store(&dir) {
            let hint = format!(
                "create one with `understory --store {} init`",
                dir.display()
            );
            return Err(
                CommandError::failed(format!("there is no store in {}", dir.display())).hint(hint),
            );
        }
        let mut options = StoreOptions::default();
        options.castore.read_only = read_only;
        Ok(Store::open(&dir, &options)?)
    }
    /// Opens the store to change it, and creates it if there is none.
    pub(crate) fn open_or_create(&self, options: &StoreOptions) -> Result<Store> {
        let dir = self.store_path()?;
        if !is_store(&dir) {
            Store::create(&dir, &StoreDir::default())?;
            self.ui
                .say(format_args!("created a store in {}", dir.display()));
        }
        Ok(Store::open(&dir, options)?)
    }
}

/// True if there is a store in `dir`: its `format` file is written last.
pub(crate) fn is_store(dir: &std::path::Path) -> bool {
    dir.join("format").exists()
}
