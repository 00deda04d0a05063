package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/keyring"
	"github.com/meshca/meshca/ca/pkcs11"
)

// Where the key of the intermediate can be.
const (
	inMemory = "memory"
	inDisk   = "disk"
	inToken  = "pkcs11"
)

// complete fills in defaults, and refuses what contradicts itself or this build.
func (k *KeyConfig) complete() error {
	if k.In == "" {
		k.In = inMemory
	}
	switch {
	case k.In != inMemory && k.In != inDisk && k.In != inToken:
		return fmt.Errorf("in: %q is none of memory, disk, pkcs11", k.In)
	case k.In != inToken && k.URI != "":
		return fmt.Errorf("uri: it names a PKCS #11 token, and the key is in %s: write `in: pkcs11`", k.In)
	case k.In != inToken:
		return nil
	case k.URI == "":
		return errors.New("uri: name the token, such as pkcs11:token=meshca?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=/etc/meshca/pin")
	}
	var err error
	if k.token, err = parseToken(k.URI); err != nil {
		return fmt.Errorf("uri: %w", err)
	}
	if k.token.ID != "" {
		return errors.New("uri: each key gets an id of its own: leave id out")
	}
	if k.token.Object == "" {
		k.token.Object = "meshca-intermediate"
	}
	return nil
}

// parseToken reads a PKCS #11 URI for this build. The build comes first: who took the wrong one has to hear that.
func parseToken(uri string) (pkcs11.URI, error) {
	if err := pkcs11.CheckBuild(); err != nil {
		return pkcs11.URI{}, err
	}
	return pkcs11.Parse(uri)
}

// files are those that the intermediate's key is in or comes from.
func (k *KeyConfig) files(dir string) []namedFile {
	if k.In == inMemory {
		return nil
	}
	return append(tokenFiles("intermediate.key.uri", k.URI), namedFile{"intermediate.key (kept intermediates)", dir, true})
}

// tokenFiles are those that a PKCS #11 URI names.
func tokenFiles(key, uri string) []namedFile {
	u, err := pkcs11.Parse(uri)
	if err != nil {
		return nil
	}
	return []namedFile{{key + " (module-path)", u.Module, false}, {key + " (pin-source)", u.PinSource, false}}
}

// rootKey is what the key of the root is called that the configuration names.
const rootKey = "root key"

// secrets are files and directories of keys and PINs that nobody but the CA may use.
func (c *Config) secrets() (all []namedFile) {
	add := func(what, path string) { all = append(all, namedFile{key: what, path: path}) }
	if d := c.Upstream.Disk; d != nil {
		if u, err := pkcs11.Parse(d.KeyFile); err == nil {
			add("PIN of the root key's token", u.PinSource)
		} else {
			add(rootKey, d.KeyFile)
		}
	}
	switch c.Intermediate.Key.In {
	case inToken:
		add("PIN of the intermediate's token", c.Intermediate.Key.token.PinSource)
		add("kept intermediates", c.intermediatesDir())
	case inDisk:
		add("kept intermediates", c.intermediatesDir())
	}
	return all
}

// intermediatesDir is where intermediates are kept.
func (c *Config) intermediatesDir() string { return filepath.Join(c.StateDir, "intermediates") }

// openKeys opens what keeps the intermediates' keys; nil: they stay in memory.
func openKeys(c *Config, tokens *pkcs11.Modules, log *slog.Logger) (*keyring.Ring, error) {
	k := c.Intermediate.Key
	if k.In == inMemory {
		return nil, keyring.Abandon(c.intermediatesDir(), log)
	}
	return keyring.Open(keyring.Config{Dir: c.intermediatesDir(), Token: k.token, Modules: tokens, Log: log})
}

// assign puts the first assignment into force. Below other roots nothing is kept: one that signs no more must not sign
// again because it once did.
func (d *daemon) assign(a ca.Assignment) error {
	if d.keys != nil {
		if err := d.keys.Retain(a.Root.ID, a.Successor.ID); err != nil {
			return err
		}
	}
	d.authority.Assign(a)
	return nil
}

// checkToken tries the token of the intermediate's key as serve would use it.
func checkToken(out io.Writer, c *Config, tokens *pkcs11.Modules) error {
	k := c.Intermediate.Key
	if k.In != inToken {
		return nil
	}
	if err := tokens.Probe(k.token); err != nil {
		return fmt.Errorf("intermediate.key.uri: %w", err)
	}
	fmt.Fprintf(out, "intermediate.key: the token %s takes the PIN\n", k.token.TokenName())
	return nil
}
