package main

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/timestamppb"
	"sigs.k8s.io/yaml"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/serial"
)

// bundleView is the output of `bundle show`.
type bundleView struct {
	TrustDomain     string     `json:"trustDomain"`
	Sequence        *uint64    `json:"sequence,omitempty"`
	X509Authorities []rootView `json:"x509Authorities"`
	JWTAuthorities  []string   `json:"jwtAuthorities"`
}

type rootView struct {
	Subject      string    `json:"subject"`
	Serial       string    `json:"serial"`
	NotBefore    time.Time `json:"notBefore"`
	NotAfter     time.Time `json:"notAfter"`
	SubjectKeyID string    `json:"subjectKeyId"`
	SHA256       string    `json:"sha256"`
}

func (c *cli) bundleCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "bundle", Short: "Show and export the trust bundle"}
	cmd.RunE = c.group(cmd)
	cmd.AddCommand(&cobra.Command{
		Use: "show", Short: "The roots that relying parties trust", Args: args(0, 0, "no arguments"),
		Long: `Shows the trust bundle of the CA, or with --agent the one that the agent holds: roots alone, and its sequence,
which grows by each change.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			b, _, err := c.bundle(cmd)
			if err != nil {
				return err
			}
			v := view(b)
			return c.show(v, func(p *page) { drawBundle(p, v) })
		},
	}, c.exportCommand())
	return cmd
}

func (c *cli) exportCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use: "export", Short: "Write the trust bundle to the standard output", Args: args(0, 0, "no arguments"),
		Long: `Writes the bundle as a SPIFFE bundle document (JSON, with its sequence), or its X.509 roots as PEM: what an agent
needs for its first trust. "-o json" and "-o yaml" wrap PEM in a document, and write SPIFFE's as that.`,
		Example: "  certctl bundle export --format spiffe > bundle.json",
	}
	formats := []string{"spiffe", "pem"}
	cmd.Flags().StringVar(&format, "format", "spiffe", "spiffe or pem")
	_ = cmd.RegisterFlagCompletionFunc("format", cobra.FixedCompletions(formats, cobra.ShellCompDirectiveNoFileComp))
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if !slices.Contains(formats, format) {
			return usage("--format %.64q is neither spiffe nor pem", format)
		}
		b, raw, err := c.bundle(cmd)
		if err != nil {
			return err
		}
		if format == "pem" {
			roots := encodePEM(b.X509Authorities())
			if c.format == formatTable {
				_, err = c.out.Write(roots)
				return err
			}
			return c.show(map[string]string{"pem": string(roots)}, nil)
		}
		if c.format != formatYAML {
			return writeAll(c, json.RawMessage(raw))
		}
		doc, err := yaml.JSONToYAML(raw)
		if err == nil {
			_, err = c.out.Write(doc)
		}
		return err
	}
	return cmd
}

func writeAll(c *cli, raw json.RawMessage) error {
	b, err := encode(raw)
	if err == nil {
		_, err = c.out.Write(b)
	}
	return err
}

// bundle asks for the trust bundle, and returns it read and as it came.
func (c *cli) bundle(cmd *cobra.Command) (*spiffebundle.Bundle, []byte, error) {
	ctx, cancel := c.within(cmd)
	defer cancel()
	agent, err := c.one()
	if err != nil {
		return nil, nil, err
	}
	ask, w := c.caBundle, theCA
	if agent {
		ask, w = c.agentBundle, theAgent
	}
	td, raw, err := ask(ctx)
	if err != nil {
		return nil, nil, err
	}
	b, err := spiffebundle.Parse(td, raw)
	if err != nil {
		return nil, nil, no(w.name+"'s trust bundle cannot be read", err, "")
	}
	return b, raw, nil
}

func (c *cli) caBundle(ctx context.Context) (td spiffeid.TrustDomain, raw []byte, err error) {
	conn, err := c.openCA(ctx)
	if err != nil {
		return td, nil, err
	}
	defer conn.Close()
	s, err := conn.CA.GetStatus(ctx, &meshcav1.GetStatusRequest{})
	if err != nil {
		return td, nil, theCA.failed(err)
	}
	r, err := conn.CA.GetBundle(ctx, &meshcav1.GetBundleRequest{})
	if err != nil {
		return td, nil, theCA.failed(err)
	}
	td, err = spiffeid.TrustDomainFromString(s.GetTrustDomain())
	return td, r.GetBundle(), err
}

func (c *cli) agentBundle(ctx context.Context) (td spiffeid.TrustDomain, raw []byte, err error) {
	conn, err := c.openAgent(ctx)
	if err != nil {
		return td, nil, err
	}
	defer conn.Close()
	s, err := conn.Agent.GetAgentStatus(ctx, &meshcav1.GetAgentStatusRequest{})
	if err != nil {
		return td, nil, theAgent.failed(err)
	}
	r, err := conn.Agent.GetAgentBundle(ctx, &meshcav1.GetAgentBundleRequest{})
	if err != nil {
		return td, nil, theAgent.failed(err)
	}
	if len(r.GetBundle()) == 0 {
		return td, nil, no("the agent has no trust bundle yet", nil, "`certctl check --agent` says what it waits for")
	}
	td, err = spiffeid.TrustDomainFromString(s.GetTrustDomain())
	return td, r.GetBundle(), err
}

func view(b *spiffebundle.Bundle) bundleView {
	v := bundleView{TrustDomain: b.TrustDomain().Name(), X509Authorities: []rootView{}, JWTAuthorities: []string{}}
	if n, ok := b.SequenceNumber(); ok {
		v.Sequence = &n
	}
	for _, r := range b.X509Authorities() {
		v.X509Authorities = append(v.X509Authorities, rootView{
			Subject: r.Subject.String(), Serial: serial.String(r.SerialNumber), NotBefore: r.NotBefore.UTC(), NotAfter: r.NotAfter.UTC(),
			SubjectKeyID: hex.EncodeToString(r.SubjectKeyId), SHA256: fingerprint(r.Raw),
		})
	}
	v.JWTAuthorities = append(v.JWTAuthorities, slices.Sorted(maps.Keys(b.JWTAuthorities()))...)
	return v
}

func drawBundle(p *page, v bundleView) {
	if v.Sequence != nil {
		p.line("Trust bundle of %s, sequence %d", v.TrustDomain, *v.Sequence)
	} else {
		p.line("Trust bundle of %s, without a sequence", v.TrustDomain)
	}
	var rows [][]cell
	for _, r := range v.X509Authorities {
		rows = append(rows, []cell{text(r.Subject), text(r.Serial), p.ends(timestamppb.New(r.NotBefore), timestamppb.New(r.NotAfter)), text(r.SHA256)})
	}
	if len(rows) > 0 {
		p.gap()
		p.table([]string{"X.509 ROOT", "SERIAL", "ENDS", "SHA-256"}, rows)
	}
	if len(v.JWTAuthorities) > 0 {
		p.gap()
		rows = nil
		for _, id := range v.JWTAuthorities {
			rows = append(rows, []cell{text(id)})
		}
		p.table([]string{"JWT KEY"}, rows)
	}
}

func encodePEM(certs []*x509.Certificate) []byte {
	var out []byte
	for _, cert := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})...)
	}
	return out
}

func fingerprint(der []byte) string {
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:])
}

// readBundle reads roots of a file, SPIFFE JSON or PEM.
func readBundle(data []byte, td spiffeid.TrustDomain) (*spiffebundle.Bundle, error) {
	if b, err := spiffebundle.Parse(td, data); err == nil {
		return b, nil
	}
	var roots []*x509.Certificate
	for rest := data; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("a certificate in it: %w", err)
		}
		roots = append(roots, cert)
	}
	if len(roots) == 0 {
		return nil, errors.New("it is neither a SPIFFE bundle nor PEM certificates")
	}
	return spiffebundle.FromX509Authorities(td, roots), nil
}
