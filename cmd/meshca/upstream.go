package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/keyfile"
	"github.com/meshca/meshca/ca/pkcs11"
	"github.com/meshca/meshca/ca/upstream/disk"
	"github.com/meshca/meshca/ca/upstream/vault"
)

func (u *UpstreamConfig) check() error {
	switch {
	case u.Disk == nil && u.Vault == nil:
		return errors.New("upstream: name one, such as `upstream: {disk: {}}`")
	case u.Disk != nil && u.Vault != nil:
		return errors.New("upstream: both disk and vault are named, and exactly one signs")
	case u.Disk != nil && pkcs11.IsURI(u.Disk.KeyFile):
		key, err := parseToken(u.Disk.KeyFile)
		if err == nil && key.Object == "" {
			err = errors.New("the URI names no key: ;object=LABEL")
		}
		if err == nil && u.Disk.PassphraseFile != "" {
			err = errors.New("a key in a PKCS #11 token has no passphrase, its PIN comes from the URI's pin-source: leave passphraseFile out")
		}
		if err != nil {
			return fmt.Errorf("upstream.disk.keyFile: %w", err)
		}
	case u.Vault != nil:
		if err := u.Vault.Validate(); err != nil {
			return fmt.Errorf("upstream.vault: %w", err)
		}
	}
	return nil
}

// files are those that the upstream's piece names.
func (u *UpstreamConfig) files() []namedFile {
	if d := u.Disk; d != nil {
		all := []namedFile{
			{"upstream.disk.certFile", d.CertFile, true},
			{"upstream.disk.passphraseFile", d.PassphraseFile, false},
		}
		if pkcs11.IsURI(d.KeyFile) {
			all = append(all, tokenFiles("upstream.disk.keyFile", d.KeyFile)...)
		} else {
			all = append(all, namedFile{"upstream.disk.keyFile", d.KeyFile, true})
		}
		for i, path := range d.ExtraAnchors {
			all = append(all, namedFile{fmt.Sprintf("upstream.disk.extraAnchors[%d]", i), path, false})
		}
		return all
	}
	if u.Vault == nil {
		return nil
	}
	all := []namedFile{{"upstream.vault.caFile", u.Vault.CAFile, false}, {"upstream.vault.rootFile", u.Vault.RootFile, false}}
	secret := func(key, path string) { all = append(all, namedFile{"upstream.vault.auth." + key, path, false}) }
	auth := u.Vault.Auth
	secret("tokenFile", auth.TokenFile)
	if x := auth.AppRole; x != nil {
		secret("appRole.roleIDFile", x.RoleIDFile)
		secret("appRole.secretIDFile", x.SecretIDFile)
	}
	if x := auth.Kubernetes; x != nil {
		secret("kubernetes.tokenFile", x.TokenFile)
	}
	if x := auth.Cert; x != nil {
		secret("cert.certFile", x.CertFile)
		secret("cert.keyFile", x.KeyFile)
	}
	return all
}

// successors is the directory of the roots that replace the one that the configuration names.
func (c *Config) successors() string { return filepath.Join(c.StateDir, "roots") }

// successor is one that lies there; empty where none does.
func (c *Config) successor() string {
	certs, _ := filepath.Glob(filepath.Join(keyfile.Literal(c.successors()), "*.crt"))
	if len(certs) == 0 {
		return ""
	}
	return certs[0]
}

// openUpstreamFunc opens an upstream; observe is told of each call to one that is elsewhere.
type openUpstreamFunc func(c *Config, tokens *pkcs11.Modules, log *slog.Logger, observe func(vault.Call)) (ca.Upstream, error)

// openUpstream opens what signs the intermediate. A Vault's is to be run (Run) and closed.
func openUpstream(c *Config, tokens *pkcs11.Modules, log *slog.Logger, observe func(vault.Call)) (ca.Upstream, error) {
	if c.Upstream.Vault != nil {
		return openVault(c, log, observe)
	}
	return openDisk(c, tokens)
}

func openDisk(c *Config, tokens *pkcs11.Modules) (*disk.Upstream, error) {
	root := c.Upstream.Disk.files()
	root.Tokens = tokens
	return disk.Open(disk.Options{Root: root, Successors: c.successors(), TrustDomain: c.trustDomain})
}

func openVault(c *Config, log *slog.Logger, observe func(vault.Call)) (*vault.Upstream, error) {
	return vault.New(*c.Upstream.Vault, vault.Options{Life: c.Intermediate.TTL.Duration, Log: log, Observe: observe})
}

// checkLive tries the upstream as serve would use it, and tells what is wrong. It changes nothing.
func checkLive(ctx context.Context, out io.Writer, c *Config) error {
	tokens := pkcs11.New()
	defer func() { _ = tokens.Close() }()
	if err := checkToken(out, c, tokens); err != nil {
		return err
	}
	if c.Upstream.Vault == nil {
		if err := rootFirst(c); err != nil {
			return err
		}
		u, err := openDisk(c, tokens)
		if err != nil {
			return err
		}
		if err := u.Check(ctx); err != nil {
			return fmt.Errorf("upstream.disk: %w", err)
		}
		return tellRoots(ctx, out, u)
	}
	return checkVault(ctx, out, c)
}

// tellRoots says which roots on disk can sign.
func tellRoots(ctx context.Context, out io.Writer, u *disk.Upstream) error {
	issuers, err := u.Issuers(ctx)
	if err != nil {
		return err
	}
	usable := 0
	for _, i := range issuers {
		switch {
		case i.Fault == nil:
			usable++
		case i.Named:
			fmt.Fprintf(out, "warning: the root that upstream.disk names cannot sign: %v\nThat does no harm once it was replaced: `certctl ca status` shows which root signs.\n", i.Fault)
		default:
			fmt.Fprintf(out, "warning: a successor of the root cannot sign: %v\n", i.Fault)
		}
	}
	switch {
	case usable == 0:
		return errors.New("upstream.disk: there is no root that can sign, see above: `certctl ca rotate root` goes to another one")
	case issuers[0].Fault != nil:
		fmt.Fprintf(out, "upstream.disk: of its successors, %d can sign\n", usable)
	default:
		fmt.Fprintln(out, "upstream.disk: the root can sign")
	}
	return nil
}

func checkVault(ctx context.Context, out io.Writer, c *Config) error {
	u, err := openVault(c, nil, nil)
	if err != nil {
		return err
	}
	defer func() { _ = u.Close() }()
	failed := false
	for _, f := range u.Check(ctx) {
		level := "warning"
		if !f.Warning {
			level = "error"
			failed = true
		}
		fmt.Fprintf(out, "%s: %s: %s\n", level, f.What, f.Why)
		if f.Do != "" {
			fmt.Fprintln(out, f.Do)
		}
	}
	if failed {
		return fmt.Errorf("upstream.vault at %s cannot sign an intermediate, see above", c.Upstream.Vault.Address)
	}
	st := u.Status()
	fmt.Fprintf(out, "upstream.vault: the issuer %s can sign (logged in by %s at %s)\n", st.IssuerID, st.LoginBy, st.Address)
	return nil
}
