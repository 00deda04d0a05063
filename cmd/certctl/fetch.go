package main

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
)

// fetched is the output of `svid fetch`. It holds no key: keys go to files of mode 0600 alone.
type fetched struct {
	inspection
	// PEM is there when nothing was written to files.
	PEM *fetchedPEM `json:"pem,omitempty"`
	// Files are what was written.
	Files []string `json:"files"`
}

type fetchedPEM struct {
	SVID   string `json:"svid"`
	Bundle string `json:"bundle"`
}

func (c *cli) fetchCommand() *cobra.Command {
	var dir, name string
	cmd := &cobra.Command{
		Use: "fetch SOCKET", Short: "Fetch the SVID that a workload's SDS socket serves", Args: args(1, 1, "one SDS socket"),
		Long: `Asks a workload's SDS socket as its proxy does. With --dir it writes svid.pem, key.pem (mode 0600) and bundle.pem
there, each replaced as a whole; without, it shows the certificates and keeps the key to itself. A workload that is
pending or denied is served nothing: unless --timeout says otherwise, that is told after 5 seconds. Exit code 1 when
there is no SVID, or when something is wrong with it.`,
		Example: `  certctl svid fetch /run/meshca-agent/shop-cart.sock
  certctl svid fetch /run/meshca-agent/shop-cart.sock --dir ./tls`,
	}
	cmd.Flags().StringVar(&dir, "dir", "", "write the files into this `directory`; it is made if need be")
	cmd.Flags().StringVar(&name, "name", "default", "the secret's `name`: default, or a SPIFFE ID")
	_ = cmd.MarkFlagDirname("dir")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		ctx, cancel := c.within(cmd)
		defer cancel()
		return c.fetch(ctx, args[0], name, dir)
	}
	return cmd
}

func (c *cli) fetch(ctx context.Context, socket, name, dir string) error {
	if !exists(socket) {
		return &failure{code: exitUnreachable, what: "cannot fetch from " + socket, why: "there is no such socket", next: "`certctl status --agent` shows the agent's sockets"}
	}
	s, err := c.fetchSecrets(ctx, socket, name)
	if err != nil {
		return err
	}
	out := fetched{inspection: c.examine(socket, s.chain, s.roots), Files: []string{}}
	if dir == "" {
		out.PEM = &fetchedPEM{string(encodePEM(s.chain)), string(encodePEM(s.roots))}
	} else if out.Files, err = s.write(dir); err != nil {
		return no("cannot write the files", err, "")
	}
	err = c.show(out, func(p *page) {
		drawInspection(p, out.inspection)
		p.gap()
		for _, f := range out.Files {
			p.line("wrote %s", f)
		}
		if dir == "" {
			p.line("nothing was written; --dir writes svid.pem, key.pem and bundle.pem")
		}
	})
	if err == nil && !out.OK {
		return negative
	}
	return err
}

// write puts the key first: a reader that finds a new certificate finds its key.
func (s *secrets) write(dir string) ([]string, error) {
	key, err := x509.MarshalPKCS8PrivateKey(s.key)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	var written []string
	for _, f := range []struct {
		name string
		data []byte
		mode fs.FileMode
	}{
		{"key.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}), 0o600},
		{"svid.pem", encodePEM(s.chain), 0o644},
		{"bundle.pem", encodePEM(s.roots), 0o644},
	} {
		path := filepath.Join(dir, f.name)
		if err := replace(path, f.data, f.mode); err != nil {
			return written, err
		}
		written = append(written, path)
	}
	return written, nil
}

// replace writes a file as a whole: it is never seen half-written, nor a key with more than its mode.
func replace(path string, data []byte, mode fs.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(f.Name()) }() // gone after the rename
	if _, err = f.Write(data); err == nil {
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	if closing := f.Close(); err == nil {
		err = closing
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return os.Rename(f.Name(), path)
}

// bundleOf makes a bundle of roots for the leaf's trust domain; nil where the leaf names none.
func bundleOf(chain, roots []*x509.Certificate) *x509bundle.Bundle {
	id, err := idOf(chain[0])
	if err != nil || len(roots) == 0 {
		return nil
	}
	return x509bundle.FromX509Authorities(id.TrustDomain(), roots)
}
