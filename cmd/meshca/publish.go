package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshca/meshca/cmd/internal/incluster"
)

const (
	// publishLook is how often the bundle file is looked at, publishAgain how often the ConfigMap is written though the file
	// is the same: what others changed in it is put back then.
	publishLook  = 2 * time.Second
	publishAgain = time.Minute
	// publishedKey is the key of the ConfigMap; agents read it as a file of that name.
	publishedKey = "bundle.json"
)

// publisher keeps a ConfigMap of the pod's own namespace equal to the bundle file.
type publisher struct {
	file string
	put  func(ctx context.Context, bundle []byte) error
	log  *slog.Logger

	last []byte
	at   time.Time // of the last success
	err  error     // of the last try
}

func trustCommand() *cobra.Command {
	group := &cobra.Command{Use: "trust", Short: "Hand out the trust bundle"}
	var file, name string
	publish := &cobra.Command{
		Use:   "publish --file FILE --config-map NAME",
		Short: "Keep a ConfigMap equal to the CA's bundleFile, for agents' first trust",
		Long: "Runs beside the CA in its pod, and keeps the ConfigMap of that name in the pod's namespace equal to the file that the\n" +
			"CA's bundleFile names, under the key " + publishedKey + ". The ConfigMap must exist; the pod's service account needs the right to\n" +
			"patch it, and nobody else should have that: agents believe what stands there.",
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			api, err := incluster.New()
			if err != nil {
				return err
			}
			log := slog.New(slog.NewJSONHandler(os.Stderr, nil))
			p := &publisher{file: file, log: log, put: configMap(api, name)}
			p.run(c.Context())
			return nil
		},
	}
	publish.Flags().StringVar(&file, "file", "", "the CA's bundleFile")
	publish.Flags().StringVar(&name, "config-map", "", "name of the ConfigMap")
	needs(publish, "file", "config-map")
	group.AddCommand(publish)
	return group
}

// configMap writes the one key, by server-side apply: what else stands in the object is its owners'.
func configMap(api *incluster.Client, name string) func(context.Context, []byte) error {
	return func(ctx context.Context, bundle []byte) error {
		namespace, err := api.Namespace()
		if err != nil {
			return err
		}
		body, err := json.Marshal(map[string]any{
			"apiVersion": "v1", "kind": "ConfigMap", "metadata": map[string]string{"name": name},
			"data": map[string]string{publishedKey: string(bundle)},
		})
		if err != nil {
			return err
		}
		path := "/api/v1/namespaces/" + url.PathEscape(namespace) + "/configmaps/" + url.PathEscape(name) + "?fieldManager=meshca-trust&force=true"
		_, err = api.Do(ctx, http.MethodPatch, path, "application/apply-patch+yaml", body)
		return err
	}
}

// run goes on until ctx ends.
func (p *publisher) run(ctx context.Context) {
	tick := time.NewTicker(publishLook)
	defer tick.Stop()
	for {
		p.look(ctx)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// look publishes what the file holds, if that is new or was published long ago.
func (p *publisher) look(ctx context.Context) {
	bundle, err := os.ReadFile(p.file)
	if err == nil && len(bundle) == 0 {
		err = errors.New(p.file + " is empty")
	}
	changed := !bytes.Equal(bundle, p.last)
	if err == nil && !changed && time.Since(p.at) < publishAgain {
		return
	}
	if err == nil {
		err = p.put(ctx, bundle)
	}
	if ctx.Err() != nil {
		return
	}
	before := p.err
	p.err = err
	switch {
	case err == nil:
		p.last, p.at = bundle, time.Now()
		if changed || before != nil {
			p.log.Info("the trust bundle is published")
		}
	case before == nil || before.Error() != err.Error():
		p.log.Error("the trust bundle is not published; it is tried again", "file", p.file, "error", err)
	}
}
