package main

import (
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// read wants the files of kubernetes.io/tls: a chain and its key, by roots that are there too.
func read(p *printer, dir string) error {
	svid, err := x509svid.Load(filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key"))
	if err != nil {
		return err
	}
	roots, err := x509bundle.Load(svid.ID.TrustDomain(), filepath.Join(dir, "ca.crt"))
	if err != nil {
		return err
	}
	if _, _, err := x509svid.Verify(svid.Certificates, roots); err != nil {
		return err
	}
	key, err := os.Stat(filepath.Join(dir, "tls.key"))
	if err != nil {
		return err
	}
	p.say(Line{
		What: "files", ID: svid.ID.String(), Serial: serial(svid.Certificates[0]), Roots: len(roots.X509Authorities()),
		Text: fmt.Sprintf("uid %d, key %v", os.Getuid(), key.Mode()),
	})
	return nil
}

func serial(c *x509.Certificate) string { return hex.EncodeToString(c.SerialNumber.Bytes()) }
