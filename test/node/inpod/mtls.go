package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// folder holds credentials and trust as kubelet projects them. Both are read at each use, as they are then.
type folder string

var (
	_ x509svid.Source   = folder("")
	_ x509bundle.Source = folder("")
)

// GetX509SVID reads key and chain.
func (f folder) GetX509SVID() (*x509svid.SVID, error) {
	text, err := os.ReadFile(filepath.Join(string(f), "credentials.pem"))
	if err != nil {
		return nil, err
	}
	return x509svid.Parse(text, text)
}

// GetX509BundleForTrustDomain reads the roots.
func (f folder) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	return x509bundle.Load(td, filepath.Join(string(f), "trust.pem"))
}

// serveMTLS answers with the caller's SPIFFE ID, the serial of the certificate that the caller was shown, and how many
// roots the server trusts.
func serveMTLS(ctx context.Context, address, dir string) error {
	f := folder(dir)
	server := &http.Server{
		Addr: address, ReadHeaderTimeout: 5 * time.Second, TLSConfig: tlsconfig.MTLSServerConfig(f, f, tlsconfig.AuthorizeAny()),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			caller, err := x509svid.IDFromCert(r.TLS.PeerCertificates[0])
			if err != nil {
				http.Error(w, err.Error(), http.StatusForbidden)
				return
			}
			svid, err := f.GetX509SVID()
			if err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
				return
			}
			trust, err := f.GetX509BundleForTrustDomain(caller.TrustDomain())
			if err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
				return
			}
			fmt.Fprintf(w, "%s %x %d", caller, svid.Certificates[0].SerialNumber, len(trust.X509Authorities()))
		}),
	}
	server.SetKeepAlivesEnabled(false) // each request has a handshake of its own
	defer context.AfterFunc(ctx, func() { _ = server.Close() })()
	if err := server.ListenAndServeTLS("", ""); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// fetchMTLS prints the answer, and who gave it.
func fetchMTLS(ctx context.Context, url, dir string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	f := folder(dir)
	conf := tlsconfig.MTLSClientConfig(f, f, tlsconfig.AuthorizeAny())
	verify := conf.VerifyPeerCertificate
	conf.VerifyConnection = func(s tls.ConnectionState) error {
		server, err := x509svid.IDFromCert(s.PeerCertificates[0])
		if err == nil {
			fmt.Print(server, " ")
		}
		return err
	}
	if verify == nil {
		return errors.New("nothing would verify the server")
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	return show(&http.Client{Transport: &http.Transport{TLSClientConfig: conf}}, request)
}
