package main

import (
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"time"

	"go.step.sm/crypto/pemutil"

	"github.com/meshca/meshca/ca/pkcs11"
	"github.com/meshca/meshca/ca/upstream/disk"
)

func (c *DiskConfig) files() disk.Files {
	return disk.Files{Cert: c.CertFile, Key: c.KeyFile, Passphrase: c.PassphraseFile}
}

// rootOptions are the flags of `meshca root create`.
type rootOptions struct {
	name      string
	years     int
	ifMissing bool
	published string
}

// createRoot makes the root: the explicit step that `meshca serve` never takes by itself.
func createRoot(out io.Writer, c *Config, o rootOptions) error {
	if o.years < 1 || o.years > 50 {
		return usageError{fmt.Errorf("--years: %d does not lie between 1 and 50", o.years)}
	}
	if o.published != "" && !o.ifMissing {
		return usageError{errors.New("--published goes with --if-missing")}
	}
	if err := needsDisk(c); err != nil {
		return err
	}
	if o.ifMissing {
		stands, err := rootStands(c, o.published)
		if err != nil {
			return err
		}
		if stands {
			fmt.Fprintf(out, "the root stands already: %s\n", c.Upstream.Disk.CertFile)
			return nil
		}
	}
	files := c.Upstream.Disk.files()
	files.Tokens = pkcs11.New()
	defer func() { _ = files.Tokens.Close() }()
	root, err := disk.Create(files, disk.CreateOptions{
		TrustDomain: c.trustDomain, CommonName: o.name, Life: time.Duration(o.years) * 365 * 24 * time.Hour,
	})
	if err != nil {
		return err
	}
	describeRoot(out, "made", root, c)
	return nil
}

// rootStands tells whether the root's certificate is there. Where it is not, and something says that this CA has had a
// root, that root was lost: another one in its place would lock out every agent and every proxy.
func rootStands(c *Config, published string) (bool, error) {
	switch _, err := os.Stat(c.Upstream.Disk.CertFile); {
	case err == nil:
		return true, nil
	case !errors.Is(err, fs.ErrNotExist):
		return false, err
	}
	return false, rootLost(c, c.storePath(), published)
}

// rootLost says by what it can be seen that the CA has had a root; nil where nothing says so. The store, and a bundle that was
// published elsewhere than the configuration says, are looked at where they are named.
func rootLost(c *Config, store, published string) error {
	for _, trace := range []struct{ path, what string }{
		{store, "the CA's store is there"},
		{published, "a trust bundle was published"},
		{c.BundleFile, "a trust bundle was published"},
		{c.successor(), "another root of this CA lies in its state directory"},
	} {
		if trace.path == "" {
			continue
		}
		switch _, err := os.Stat(trace.path); {
		case err == nil:
			return fmt.Errorf("%s (%s), and its root %s is not: put the root back from your copy, with its key, and the store from a backup (`meshca restore`) "+
				"if that is lost, too. If a new trust domain is to begin here, take the old one's traces away first", trace.what, trace.path, c.Upstream.Disk.CertFile)
		case !errors.Is(err, fs.ErrNotExist):
			return fmt.Errorf("nobody can say whether this CA has had a root: %w", err)
		}
	}
	return nil
}

// rootFirst refuses to begin a store where no root was made: to rootStands it would say that there was one, and that it is lost.
func rootFirst(c *Config) error {
	if c.Upstream.Disk == nil {
		return nil
	}
	if _, err := os.Stat(c.storePath()); !errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if _, err := os.Stat(c.Upstream.Disk.CertFile); errors.Is(err, fs.ErrNotExist) {
		return noRootYet(c, fmt.Errorf("the root's certificate: %w", err))
	}
	return nil
}

// noRootYet adds what leads out to what failed for want of a root, where the CA has no store or an empty one: how a root comes
// to be, unless something says that there was one. Where one of its files is there, it is about that.
func noRootYet(c *Config, failed error) error {
	root := c.Upstream.Disk
	for _, path := range []string{root.CertFile, root.KeyFile} {
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			return failed
		}
	}
	if lost := rootLost(c, "", ""); lost != nil {
		return fmt.Errorf("%w: %w", failed, lost)
	}
	file, key := c.file, " --key FILE"
	if file == "" {
		file = "FILE"
	}
	if pkcs11.IsURI(root.KeyFile) {
		key = ""
	}
	return fmt.Errorf("there is no root yet: %w. Make it, once: `meshca root create --config %s`. Or bring one along: `meshca root import --config %s --cert FILE%s`",
		failed, file, file, key)
}

// importRoot checks an existing root and copies it to where serve expects it.
func importRoot(out io.Writer, c *Config, certFile, keyFile string) error {
	if err := needsDisk(c); err != nil {
		return err
	}
	files := c.Upstream.Disk.files()
	if keyFile == "" && !pkcs11.IsURI(files.Key) {
		return usageError{errors.New("`meshca root import` needs --key FILE: upstream.disk.keyFile names no PKCS #11 token that has the key")}
	}
	files.Tokens = pkcs11.New()
	defer func() { _ = files.Tokens.Close() }()
	root, err := disk.Import(disk.Files{Cert: certFile, Key: keyFile}, files)
	if err != nil {
		return err
	}
	describeRoot(out, "imported", root, c)
	return nil
}

// needsDisk refuses to put a root where none is looked for.
func needsDisk(c *Config) error {
	if c.Upstream.Disk == nil {
		return errors.New("the root of this configuration is in Vault (upstream.vault): make it there, deploy/vault/README.md tells how")
	}
	return nil
}

func describeRoot(out io.Writer, what string, root *x509.Certificate, c *Config) {
	key := c.Upstream.Disk.KeyFile + " (mode 0600: keep a copy where only you can read it)"
	if u, err := pkcs11.Parse(c.Upstream.Disk.KeyFile); err == nil {
		key = u.String() + " (it stays in the token: see that the token is backed up)"
	}
	fmt.Fprintf(out, "%s root %s\n  SHA-256      %x\n  ends         %s\n  certificate  %s\n  key          %s\n",
		what, root.Subject, sha256.Sum256(root.Raw), root.NotAfter.UTC().Format(time.RFC3339), c.Upstream.Disk.CertFile, key)
}

// readAnchors reads the extra trust anchors that the configuration names. One that has ended vouches for nobody any
// more: it is left out and said, for a CA must not stay down over it.
func readAnchors(files []string, log *slog.Logger) ([]*x509.Certificate, error) {
	var anchors []*x509.Certificate
	for _, f := range files {
		found, err := pemutil.ReadCertificateBundle(f)
		if err != nil {
			return nil, fmt.Errorf("upstream.disk.extraAnchors: %s: %w", f, err)
		}
		for _, c := range found {
			if time.Now().After(c.NotAfter) {
				log.Warn("an extra trust anchor has ended and is left out: take it off upstream.disk.extraAnchors",
					"file", f, "subject", c.Subject.String(), "ended", c.NotAfter)
				continue
			}
			anchors = append(anchors, c)
		}
	}
	return anchors, nil
}
