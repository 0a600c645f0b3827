//! Who builds. The overlay store substitutes itself what it can, and hands the rest to a [`Builder`].

mod child;
mod find;
mod nix;

pub use find::Nix;
pub use nix::NixBuilder;

use crate::daemon::{ClientInfo, Reporter};
use crate::{Error, Result};
use understory_nix::StorePath;
use understory_nix::worker::{
    BasicDerivation, BuildMode, BuildResult, DerivedPath, KeyedBuildResult, SetOptions,
};

/// Something that can build derivations of an overlay store.
pub trait Builder: Send + Sync {
    /// For messages and `doctor`: what builds, or why nothing can.
    ///
    /// # Errors
    /// Nothing usable, with a hint.
    fn describe(&self) -> Result<String>;
    /// Begins to build for a client.
    ///
    /// # Errors
    /// As [`Builder::describe`]; it cannot be started.
    fn connect(&self, client: &ClientInfo) -> Result<Box<dyn BuilderSession>>;
}

/// A builder at work for one client. Dropping it ends what it does.
pub trait BuilderSession: Send {
    /// The client's settings; before each request if they have changed.
    ///
    /// # Errors
    /// The builder's.
    fn set_options(&mut self, options: &SetOptions) -> Result<()>;
    /// BuildPaths. Messages go to `reporter`; when it is cancelled, the builder is stopped.
    ///
    /// # Errors
    /// The builder's, in its words.
    fn build_paths(
        &mut self,
        paths: &[DerivedPath],
        mode: BuildMode,
        reporter: &dyn Reporter,
    ) -> Result<()>;
    /// BuildPathsWithResults; `realisation_with_path` as in
    /// [`Operations`](crate::daemon::Operations::build_paths_with_results).
    ///
    /// # Errors
    /// The builder's, in its words.
    fn build_paths_with_results(
        &mut self,
        paths: &[DerivedPath],
        mode: BuildMode,
        realisation_with_path: bool,
        reporter: &dyn Reporter,
    ) -> Result<Vec<KeyedBuildResult>>;
    /// BuildDerivation.
    ///
    /// # Errors
    /// The builder's, in its words.
    fn build_derivation(
        &mut self,
        drv: &StorePath,
        derivation: &BasicDerivation,
        mode: BuildMode,
        realisation_with_path: bool,
        reporter: &dyn Reporter,
    ) -> Result<BuildResult>;
}

/// Builds nothing: says why and what to do.
#[derive(Debug, Clone)]
pub struct NoBuilder {
    /// Why.
    pub reason: String,
}

impl Builder for NoBuilder {
    fn describe(&self) -> Result<String> {
        Err(Error::environment(self.reason.clone())
            .with_hint("install Nix 2.24 or later, or name it with `--nix`"))
    }
    fn connect(&self, _client: &ClientInfo) -> Result<Box<dyn BuilderSession>> {
        Err(self
            .describe()
            .expect_err("a builder that is none describes nothing"))
    }
}
