# NixOS module: an Understory store, its mounts and its overlay store, as a service.
#
#   imports = [ ./module.nix ];
#   services.understory = {
#     enable = true;
#     package = …;                       # a package with bin/understory
#     settings.substituters = [ "https://cache.example.org" ];
#   };
#
# Only options of `lib` that have been there for years are used; tests/real-nix/nixos-module.sh evaluates the
# module with a stand-in for `lib`, as no nixpkgs is at hand there.
{ config, lib, pkgs, ... }:

let
  cfg = config.services.understory;
  isDefaultPlace = cfg.mergedDir == "${cfg.stateDir}/merged/nix/store";
  socket = "/run/understory/overlay.sock";
  remote = "unix://${socket}"
    + (if isDefaultPlace then "?root=${cfg.stateDir}/merged"
       else if cfg.mergedDir == "/nix/store" then ""
       else "?real=${cfg.mergedDir}");
  toml = pkgs.formats.toml { };
  arguments = [
    "--store" cfg.stateDir "up" "--overlay-socket" socket
  ] ++ lib.optionals (!isDefaultPlace) [ "--merged" cfg.mergedDir ] ++ cfg.extraFlags;
in
{
  options.services.understory = {
    enable = lib.mkEnableOption "Understory, a castore with an overlay store for Nix";

    package = lib.mkOption {
      type = lib.types.package;
      description = "The package that holds bin/understory.";
    };

    stateDir = lib.mkOption {
      type = lib.types.str;
      default = "/var/lib/understory";
      description = "Directory of the castore, of the mounts and of the upper layer.";
    };

    mergedDir = lib.mkOption {
      type = lib.types.str;
      default = "${cfg.stateDir}/merged/nix/store";
      description = ''
        Where the overlay is mounted. `/nix/store` is not possible on a machine that itself runs from there
        as long as its own store is not a lower store.
      '';
    };

    settings = lib.mkOption {
      type = toml.type;
      default = { };
      example = { substituters = [ "https://cache.example.org" ]; lowers = [ "local?root=/srv/other" ]; };
      description = "Contents of /etc/understory/understory.toml; `understory config names` lists what there is.";
    };

    setNixRemote = lib.mkOption {
      type = lib.types.bool;
      default = false;
      description = "Let Nix in all login sessions use the overlay store (NIX_REMOTE).";
    };

    extraFlags = lib.mkOption {
      type = lib.types.listOf lib.types.str;
      default = [ ];
      description = "Further flags for `understory up`.";
    };

    remote = lib.mkOption {
      type = lib.types.str;
      readOnly = true;
      default = remote;
      description = "What clients set NIX_REMOTE to.";
    };
  };

  config = lib.mkIf cfg.enable {
    environment.systemPackages = [ cfg.package ];
    environment.etc."understory/understory.toml".source = toml.generate "understory.toml" cfg.settings;
    environment.sessionVariables = lib.mkIf cfg.setNixRemote { NIX_REMOTE = remote; };

    systemd.sockets.understory = {
      description = "Socket of the Understory overlay store";
      wantedBy = [ "sockets.target" ];
      unitConfig.RequiresMountsFor = [ cfg.stateDir ];
      socketConfig = {
        ListenStream = socket;
        SocketMode = "0666";
        DirectoryMode = "0755";
      };
    };

    systemd.services.understory = {
      description = "Understory: castore, mounts and overlay store for Nix";
      wantedBy = [ "multi-user.target" ];
      after = [ "local-fs.target" ];
      requires = [ "understory.socket" ];
      unitConfig = {
        RequiresMountsFor = [ cfg.stateDir ];
        # When systemd gives up, mounts and sockets are lost: only if starts really do not help.
        StartLimitIntervalSec = 60;
        StartLimitBurst = 20;
      };
      # The Nix that builds.
      path = [ config.nix.package ];
      # A stop unmounts, a restart does not.
      stopIfChanged = false;
      restartTriggers = [ config.environment.etc."understory/understory.toml".source ];
      # How many descriptors systemd keeps; systemd 254 says so itself.
      environment.FDSTORE = "128";
      serviceConfig = {
        Type = "notify";
        ExecStart = lib.escapeShellArgs ([ "${cfg.package}/bin/understory" ] ++ arguments);
        KillMode = "mixed";
        RestartKillSignal = "SIGUSR1";
        TimeoutStopSec = 30;
        Restart = "on-failure";
        FileDescriptorStoreMax = 128;
        WatchdogSec = 90;
        LimitNOFILE = 1048576;
        TasksMax = "infinity";
        OOMPolicy = "continue";
      } // (if cfg.stateDir == "/var/lib/understory" then { StateDirectory = "understory"; } else { });
    };
  };
}
