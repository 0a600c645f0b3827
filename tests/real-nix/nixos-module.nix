# Evaluates dist/nixos/module.nix with a stand-in for nixpkgs: a `lib` of what the module uses, and an evalModules
# of one module and one configuration. Types are checked as far as they are named here.
{ module, settings }:

let
  inherit (builtins) all attrNames concatStringsSep foldl' isAttrs isBool isList isString listToAttrs map replaceStrings toJSON;
  type = name: check: { _type = "option-type"; inherit name check; };
  lib = {
    mkOption = o: { _type = "option"; } // o;
    mkEnableOption = description: lib.mkOption { type = lib.types.bool; default = false; inherit description; };
    mkIf = condition: content: { _type = "if"; inherit condition content; };
    optionals = condition: list: if condition then list else [ ];
    escapeShellArgs = list: concatStringsSep " " (map (a: "'${replaceStrings [ "'" ] [ "'\\''" ] (toString a)}'") list);
    types = {
      bool = type "bool" isBool;
      str = type "str" isString;
      package = type "package" (p: isString p || isAttrs p);
      attrs = type "attrs" isAttrs;
      listOf = of: type "listOf" (l: isList l && all of.check l);
    };
  };
  pkgs.formats.toml = { }: {
    type = lib.types.attrs;
    generate = name: value: "/nix/store/toml/${name}?${toJSON value}";
  };

  # Values of the options: what is set, else the default.
  resolve = path: options: set:
    if options._type or "" == "option" then
      let
        value =
          if set != null && !(options.readOnly or false) then set
          else options.default or (throw "${path} is not set and has no default");
      in
      if set != null && options.readOnly or false then throw "${path} is read-only"
      else if options.type.check value then value
      else throw "${path}: not of type ${options.type.name}"
    else
      foldl' (unknown: name: if options ? ${name} then unknown else throw "${path}.${name}: no such option")
        (listToAttrs (map (name: { inherit name; value = resolve "${path}.${name}" options.${name} (set.${name} or null); }) (attrNames options)))
        (attrNames (if set == null then { } else set));
  # mkIf pushed down.
  settle = value:
    if isAttrs value && value._type or "" == "if" then (if value.condition then settle value.content else { })
    else if isAttrs value then listToAttrs (map (name: { inherit name; value = settle value.${name}; }) (attrNames value))
    else value;

  evaluated = import module { inherit lib pkgs config; };
  made = settle evaluated.config;
  config = {
    services.understory = resolve "services.understory" evaluated.options.services.understory settings;
    nix.package = "/nix/store/nix";
    environment = made.environment;
  };
in
{ options = config.services.understory; config = made; }
