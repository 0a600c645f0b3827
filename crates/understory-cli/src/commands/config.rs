//! `config`: what is set, and who says so.

use crate::context::Context;
use crate::error::Result;
use crate::settings::FileArgs;
use understory::settings;

/// Show the settings of overlay stores, and where each comes from
///
/// Built-in values, then nix.conf, then understory.toml, then the environment (UNDERSTORY_ and the
/// name in capitals); the last one counts, and extra-NAME adds to a list.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Show all settings, or some
    Show(Show),
    /// List the names of all settings
    Names,
}

#[derive(Debug, clap::Args)]
struct Show {
    /// Only these
    names: Vec<String>,
    #[command(flatten)]
    files: FileArgs,
}

pub(crate) fn run(args: &Args, cx: &Context) -> Result<()> {
    match &args.command {
        Command::Names => {
            let names: Vec<&str> = settings::names().collect();
            if cx.json {
                return cx.ui.print_json(&names);
            }
            cx.ui.print(names.join("\n") + "\n")
        }
        Command::Show(show) => {
            let resolved = show.files.resolve()?;
            let wanted = match show.names.as_slice() {
                [] => resolved.values().collect(),
                names => names
                    .iter()
                    .map(|name| resolved.require(name))
                    .collect::<Result<Vec<_>, _>>()?,
            };
            if cx.json {
                let map: serde_json::Map<_, _> = wanted
                    .into_iter()
                    .map(|value| {
                        let origins: Vec<String> =
                            value.origins.iter().map(ToString::to_string).collect();
                        (
                            value.name.to_owned(),
                            serde_json::json!({"value": value.text, "origins": origins}),
                        )
                    })
                    .collect();
                return cx.ui.print_json(&map);
            }
            let mut out = String::new();
            for value in wanted {
                let origins: Vec<String> = value.origins.iter().map(ToString::to_string).collect();
                out.push_str(format!("{} = {}", value.name, value.text).trim_end());
                if !origins.is_empty() {
                    out.push_str(&format!("  # {}", origins.join(", ")));
                }
                out.push('\n');
            }
            cx.ui.print(out)
        }
    }
}
