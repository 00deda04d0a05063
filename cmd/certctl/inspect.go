package main

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"

	"github.com/spf13/cobra"
)

// maxInspected bounds a file or an input.
const maxInspected = 1 << 20

// inspection is the output of `svid inspect`.
type inspection struct {
	Source string        `json:"source"`
	OK     bool          `json:"ok"`
	Chain  []certificate `json:"chain"`
	// Findings are what is wrong or doubtful with it as an X509-SVID.
	Findings []finding `json:"findings"`
}

func (c *cli) inspectCommand() *cobra.Command {
	var bundleFile, serverName string
	cmd := &cobra.Command{
		Use: "inspect FILE | - | HOST:PORT | SOCKET", Short: "What a certificate is, and what is wrong with it as an SVID", Args: args(1, 1, "a file, -, HOST:PORT or an SDS socket"),
		Long: `Shows a certificate chain, its SPIFFE ID, lives and key, and checks it against the rules for X509-SVIDs. It comes
from a PEM or DER file, from the standard input (-), from whatever server answers a TLS handshake at HOST:PORT
(nothing is trusted by it, it is only looked at), or from a workload's SDS socket. With --bundle the chain must
lead to one of its roots. Exit code 1 when something is wrong.`,
		Example: `  certctl svid inspect svid.pem --bundle bundle.json
  certctl svid inspect ca.example:8443
  kubectl get secret tls -o jsonpath='{.data.tls\.crt}' | base64 -d | certctl svid inspect -`,
	}
	cmd.Flags().StringVar(&bundleFile, "bundle", "", "a `file` of roots that it must chain to, SPIFFE JSON or PEM")
	cmd.Flags().StringVar(&serverName, "servername", "", "the `name` to ask HOST:PORT for (SNI); the host by default")
	_ = cmd.MarkFlagFilename("bundle")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		ctx, cancel := c.within(cmd)
		defer cancel()
		found, err := c.collect(ctx, args[0], serverName)
		if err != nil {
			return err
		}
		if bundleFile != "" {
			data, err := c.read(ctx, "the bundle", bundleFile, maxInspected)
			if err != nil {
				return err
			}
			if found.roots, err = rootsFrom(data, found.chain); err != nil {
				return no("cannot use the bundle "+bundleFile, err, "")
			}
		}
		out := c.examine(args[0], found.chain, found.roots)
		if found.key != nil {
			out.add(keyFinding(found.chain[0], found.key))
		}
		if err := c.show(out, func(p *page) { drawInspection(p, out) }); err != nil {
			return err
		}
		if !out.OK {
			return negative
		}
		return nil
	}
	return cmd
}

// collect finds the certificates, wherever they are.
func (c *cli) collect(ctx context.Context, where, serverName string) (*secrets, error) {
	if where == "-" {
		return c.collectFile(ctx, where)
	}
	info, err := os.Stat(where)
	switch {
	case err == nil && info.Mode().Type() == fs.ModeSocket:
		return c.fetchSecrets(ctx, where, "default")
	case err == nil:
		return c.collectFile(ctx, where)
	}
	host, port, splitErr := net.SplitHostPort(where)
	if splitErr != nil || host == "" || port == "" {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, no(fmt.Sprintf("%.255s is neither a file nor HOST:PORT", where), nil, "")
		}
		return nil, no(fmt.Sprintf("cannot read %.255s", where), unnamed(err), "")
	}
	if serverName == "" && net.ParseIP(host) == nil {
		serverName = host
	}
	return handshake(ctx, where, serverName)
}

// unnamed is the error without the path, where that is told beside it.
func unnamed(err error) error {
	var at *fs.PathError
	if errors.As(err, &at) {
		return at.Err
	}
	return err
}

func (c *cli) collectFile(ctx context.Context, path string) (*secrets, error) {
	data, err := c.read(ctx, "the certificate", path, maxInspected)
	if err != nil {
		return nil, err
	}
	s, err := readCertificates(data)
	if err != nil {
		if path == "-" {
			path = "the standard input"
		}
		return nil, no("there is no certificate in "+path, err, "PEM and DER are read")
	}
	return s, nil
}

// readCertificates takes certificates and at most one key from PEM, or certificates from DER.
func readCertificates(data []byte) (*secrets, error) {
	s := &secrets{}
	for rest := data; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		switch block.Type {
		case "CERTIFICATE":
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return nil, err
			}
			s.chain = append(s.chain, cert)
		case "PRIVATE KEY", "EC PRIVATE KEY", "RSA PRIVATE KEY":
			s.key = readKey(block.Bytes)
		}
	}
	if len(s.chain) == 0 && s.key == nil {
		certs, err := x509.ParseCertificates(data) // as it is: a certificate may well end in a byte that looks like white space
		if err != nil {
			return nil, errors.New("it is neither PEM nor DER")
		}
		s.chain = certs
	}
	if len(s.chain) == 0 {
		return nil, errors.New("it holds none")
	}
	return s, nil
}

// readKey returns nil for what it cannot read: the key is only compared with the certificate.
func readKey(der []byte) crypto.Signer {
	if k, err := x509.ParsePKCS8PrivateKey(der); err == nil {
		if signer, ok := k.(crypto.Signer); ok {
			return signer
		}
	}
	if k, err := x509.ParseECPrivateKey(der); err == nil {
		return k
	}
	if k, err := x509.ParsePKCS1PrivateKey(der); err == nil {
		return k
	}
	return nil
}

// handshake looks at what a server shows. Nothing is sent to it beyond the handshake, and nothing is believed.
func handshake(ctx context.Context, address, serverName string) (*secrets, error) {
	var shown []*x509.Certificate
	dialer := tls.Dialer{Config: &tls.Config{
		ServerName: serverName, MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"},
		InsecureSkipVerify: true, //nolint:gosec // the chain is shown and judged, not relied on
		VerifyConnection: func(s tls.ConnectionState) error {
			shown = s.PeerCertificates
			return nil
		},
	}}
	conn, err := dialer.DialContext(ctx, "tcp", address)
	if err == nil {
		_ = conn.Close()
	}
	if len(shown) > 0 { // a server that then asks for our certificate has shown its own
		return &secrets{chain: shown}, nil
	}
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" || errors.Is(err, context.DeadlineExceeded) {
		return nil, &failure{code: exitUnreachable, what: "cannot reach " + address, why: err.Error(), next: "Check the address and the network between"}
	}
	return nil, no(address+" made no TLS handshake", err, "It may not speak TLS, or only with names that --servername can say")
}

// rootsFrom reads the roots of a bundle for the chain's trust domain.
func rootsFrom(data []byte, chain []*x509.Certificate) ([]*x509.Certificate, error) {
	id, err := idOf(chain[0])
	if err != nil {
		return nil, fmt.Errorf("the certificate says no trust domain: %w", err)
	}
	b, err := readBundle(data, id.TrustDomain())
	if err != nil {
		return nil, err
	}
	return b.X509Authorities(), nil
}
